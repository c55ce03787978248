"""A process of `python -m training.bench`: trains a model of random weights, a number of steps each time it is told to.

In: a line on standard input for each turn. Out: a line of JSON with what the turn took. Contestants: the steps of the uptrain command, and
the same model and tokens in transformers' T5 with Trainer.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import queue
import sys
import threading
import time
from typing import Any

from training.bench import ROOT, TARGET_TOKENS, add_sizes


def _tiny_or(preset: str, *, fido: bool, passage_length: int) -> Any:
    from export.checkpoint.config import ReaderConfig, StackConfig, reader_preset

    if preset != "tiny":
        return dataclasses.replace(reader_preset(preset, fido=fido), passage_length=passage_length)
    stack = StackConfig(d_model=48, d_kv=12, d_ff=56, num_layers=2, num_heads=4, num_kv_heads=4)
    decoder = dataclasses.replace(stack, num_kv_heads=1) if fido else stack
    return ReaderConfig(
        encoder=stack, decoder=decoder, vocab_size=3072, passage_length=passage_length, encoder_decoder_attention_period=2 if fido else 1
    )


def _reader(arguments: argparse.Namespace, *, fido: bool) -> Any:
    from export.model.reader import Reader

    reader = Reader(_tiny_or(arguments.preset, fido=fido, passage_length=arguments.passage_tokens))
    reader.reset_parameters(0)
    return reader


def _turns(step: Any, tokens: int, flops: float, arguments: argparse.Namespace) -> None:
    """Run `--steps` steps for every line on standard input; print what each turn took."""
    import torch

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    for _ in range(arguments.warmup):
        step()
    wait()
    first = int(os.environ.get("RANK", "0")) == 0
    turn = 0
    if first:
        print(json.dumps({"ready": True}), flush=True)
    while arguments.turns is None or turn < arguments.turns:
        if arguments.turns is None:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # for the contestant whose turn it is
            if not sys.stdin.readline():
                return
            step()  # gets its memory back
            wait()
        started = time.perf_counter()
        for _ in range(arguments.steps):
            loss = step()
        wait()
        seconds = time.perf_counter() - started
        memory = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
        turn += 1
        if first:
            done = {"tokens_per_s": tokens * arguments.steps / seconds, "flops_per_s": flops * arguments.steps / seconds}
            print(json.dumps({**done, "loss": float(loss), "memory_gb": round(memory, 2)}), flush=True)


def _ours(arguments: argparse.Namespace) -> None:
    """The steps of `python -m training uptrain`, without a teacher."""
    from export.checkpoint.files import Checkpoint
    from training.fit.runtime import Processes
    from training.fit.uptrain import Uptraining
    from training.fit.uptrain_options import UptrainOptions

    processes = Processes(arguments.device)
    options = UptrainOptions(
        "random",
        arguments.data,
        arguments.data.parent / f"run-{os.getpid()}",
        logits_weight=0.0,
        passages_weight=0.0,
        n_passages=(arguments.passages,),
        target_length=TARGET_TOKENS,
        steps=10**9,
        batch_questions=arguments.questions * processes.world,
        micro_questions=arguments.micro,
        passages_per_chunk=arguments.micro * arguments.passages,
        attention=arguments.attention,
        compile=arguments.compile and processes.device.type == "cuda",
        cache=arguments.data.parent / "tokens",
        tensorboard=False,
        device=arguments.device,
    )
    tokenizer_json = (ROOT / "checkpoints/fid/tokenizer.json").read_text(encoding="utf-8")
    reader = _reader(arguments, fido=arguments.kind == "fido")
    options.out.mkdir(parents=True, exist_ok=True)
    run = Uptraining(options, Checkpoint(reader, tokenizer_json, "random", "random weights"), None, processes)
    batches = run.batches()
    parts, _ = next(batches)
    tokens, flops = (processes.sum(sum(values)) for values in (map(lambda part: float(part.tokens), parts), map(run.flops, parts)))
    _turns(lambda: run.train_step(*next(batches))[0], int(tokens), flops, arguments)
    os._exit(0)  # the threads that prepare batches would go on for ever


def _trainer(arguments: argparse.Namespace) -> None:
    """The same model and the same tokens in transformers' T5 with Trainer, in its usual settings for a GPU."""
    import torch
    from transformers import T5ForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments
    from transformers.modeling_outputs import BaseModelOutput

    from export.checkpoint.hugging_face import t5_from_reader
    from training.fit.fid_data import packed, tokenized
    from training.fit.packed import forward_flops

    class FusionInDecoder(T5ForConditionalGeneration):
        def forward(self, input_ids: Any, attention_mask: Any, labels: Any, **_: Any) -> Any:
            batch, passages, length = input_ids.shape
            rows, mask = input_ids.view(-1, length), attention_mask.view(-1, length)
            hidden = self.encoder(input_ids=rows, attention_mask=mask).last_hidden_state.view(batch, passages * length, -1)
            return super().forward(
                encoder_outputs=BaseModelOutput(hidden), attention_mask=attention_mask.view(batch, -1), labels=labels, use_cache=False
            )

    reader = _reader(arguments, fido=False)
    tokenizer_json = (ROOT / "checkpoints/fid/tokenizer.json").read_text(encoding="utf-8")
    data = tokenized(
        arguments.data,
        reader.config,
        tokenizer_json,
        n_passages=arguments.passages,
        target_length=TARGET_TOKENS,
        cache=arguments.data.parent / "tokens",
    )
    model = t5_from_reader(reader)
    model.__class__ = FusionInDecoder
    model.requires_grad_(True).train()
    for module in model.modules():  # as in the other workers
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    rows = []
    for example in range(len(data)):
        prompts = data.example_prompts(example, arguments.passages)
        ids = torch.zeros(len(prompts), arguments.passage_tokens, dtype=torch.long)
        for place, prompt in enumerate(prompts):
            ids[place, : len(prompt)] = torch.from_numpy(prompt.astype("int64"))
        labels = torch.full((TARGET_TOKENS,), -100)
        target = torch.from_numpy(data.target(example, 0).astype("int64"))
        labels[: len(target)] = target
        rows.append({"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels})
    one = packed(
        [data.example_prompts(row, arguments.passages) for row in range(arguments.questions)],
        [data.target(row, 0) for row in range(arguments.questions)],
        reader.config,
        arguments.passages * arguments.questions,
    )
    gate = threading.Semaphore(0)
    done: queue.Queue[float] = queue.Queue()

    class Gate(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gate.acquire()

        def on_step_end(self, _: Any, state: Any, __: Any, **___: Any) -> None:
            done.put(state.global_step)

    on_gpu = arguments.device != "cpu" and torch.cuda.is_available()
    settings = TrainingArguments(
        output_dir=str(arguments.data.parent / f"trainer-{os.getpid()}"),
        per_device_train_batch_size=arguments.micro,
        gradient_accumulation_steps=arguments.questions // arguments.micro,
        max_steps=10**6,
        learning_rate=1e-4,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=2 if on_gpu else 0,
        dataloader_pin_memory=on_gpu,
    )
    trainer = Trainer(model=model, args=settings, train_dataset=rows, callbacks=[Gate()])
    failed: list[BaseException] = []

    def train() -> None:
        try:
            trainer.train()
        except BaseException as error:
            failed.append(error)
            done.put(-1)

    threading.Thread(target=train, daemon=True).start()

    def step() -> float:
        gate.release()
        done.get(timeout=600)
        if failed:
            raise failed[0]
        return 0.0

    _turns(step, one.tokens, 3 * forward_flops(reader.config, one), arguments)
    os._exit(0)


def main() -> None:
    """Run a worker."""
    parser = argparse.ArgumentParser(prog="python -m training.bench_worker", description=__doc__)
    add_sizes(parser)
    parser.add_argument("--kind", choices=("fid", "fido", "trainer"), required=True)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--micro", type=int, required=True)
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--turns", type=int, help="measure so often without being told")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    arguments = parser.parse_args()
    if arguments.device == "cpu":  # matrices this small only wait for each other's threads
        import torch

        torch.set_num_threads(1)
    (_trainer if arguments.kind == "trainer" else _ours)(arguments)


if __name__ == "__main__":
    main()
