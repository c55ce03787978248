"""``python -m training uptrain`` for any reader; ``corpus | train | up-train | refine | evaluate | recipe`` for the demo readers."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys

CORPUS = pathlib.Path("build/corpus")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    if "uptrain" in sys.argv[1:2]:  # its options import torch, which the corpus needs not
        from export.command_line import checkpoint_options
        from training.fit.uptrain_options import add_arguments

        parents = [checkpoint_options()]
        add_arguments(commands.add_parser("uptrain", parents=parents, help="train a converted reader on FiD's data files"))
    else:
        commands.add_parser("uptrain", help="train a converted reader on FiD's data files; see uptrain --help")

    corpus = commands.add_parser("corpus", help="build passages, questions and tokenizer from the World Factbook")
    corpus.add_argument("--out", type=pathlib.Path, default=CORPUS)

    fid_data = commands.add_parser("fid-data", help="draw training examples from the corpus into a file of FiD's format, for uptrain")
    fid_data.add_argument("--out", type=pathlib.Path, required=True)
    fid_data.add_argument("--corpus", type=pathlib.Path, default=CORPUS)
    fid_data.add_argument("--examples", type=int, default=4000)
    fid_data.add_argument("--n-passages", type=int, default=10)
    fid_data.add_argument("--seed", type=int, default=0)

    train = commands.add_parser("train", help="train a reader from random weights; resumes the run in --out")
    train.add_argument("--reader", choices=("fid", "fido"), required=True)
    up_train = commands.add_parser("up-train", help="convert a trained FiD reader to FiDO and train it further")
    up_train.add_argument("--from", dest="source", type=pathlib.Path, required=True, help="checkpoint of the FiD reader")
    up_train.add_argument("--period", type=int, default=2, help="encoder_decoder_attention_period of the result")
    up_train.add_argument("--num-kv-heads", type=int, default=1)
    refine = commands.add_parser("refine", help="train a trained reader further with every country renamed; a CPU is enough")
    refine.add_argument("--from", dest="source", type=pathlib.Path, required=True, help="checkpoint to start from")
    for command in (train, up_train, refine):
        command.add_argument("--out", type=pathlib.Path, required=True)
        command.add_argument("--corpus", type=pathlib.Path, default=CORPUS)
        budget = command.add_mutually_exclusive_group(required=True)
        budget.add_argument("--seconds", type=float, help="training time, over all resumptions")
        budget.add_argument("--steps", type=int)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--device", default="cuda")
        command.add_argument("--num-workers", type=int, default=3)
        command.add_argument("--peak-learning-rate", type=float, default={train: 2e-3, up_train: 1e-3, refine: 4e-4}[command])
        command.add_argument("--passages-per-batch", type=int, default=640)
        command.add_argument("--evaluate-every-s", type=float, default=60.0)
        command.add_argument("--evaluation-questions", type=int, default=256)
        command.add_argument("--threads", type=int, help="torch threads on the CPU")
        command.add_argument("--no-cuda-graphs", dest="cuda_graphs", action="store_false")

    evaluate = commands.add_parser("evaluate", help="greedy answers and exact match of a checkpoint")
    evaluate.add_argument("--checkpoint", type=pathlib.Path, required=True)
    evaluate.add_argument("--data", type=pathlib.Path, required=True, help="questions in FiD's JSONL format")
    evaluate.add_argument("--n-passages", type=int, nargs="+", default=[10])
    evaluate.add_argument("--device", default="cpu")
    evaluate.add_argument("--limit", type=int, help="only the first questions")
    evaluate.add_argument("--predictions", type=pathlib.Path, help="write the answers (of the last --n-passages) here")

    recipe = commands.add_parser("recipe", help="train FiD and FiDO in parallel, then the conversion, then run all evaluations")
    recipe.add_argument("--out", type=pathlib.Path, required=True)
    recipe.add_argument("--corpus", type=pathlib.Path, default=CORPUS)
    recipe.add_argument("--seconds", type=float, required=True, help="for FiD and FiDO each")
    recipe.add_argument("--up-training-seconds", type=float, required=True)
    recipe.add_argument("--device", default="cuda")
    recipe.add_argument("--num-workers", type=int, default=3)
    recipe.add_argument("--no-cuda-graphs", action="store_true")
    recipe.add_argument("--no-evaluation", action="store_true", help="skip the evaluations")
    return parser


def _train(arguments: argparse.Namespace) -> None:
    import torch

    from export.checkpoint.files import load_reader
    from export.checkpoint.weights import fido_from_fid
    from export.model.reader import Reader
    from training.fit.recipe import reader_config
    from training.fit.trainer import Trainer, TrainOptions

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    names = {field.name for field in dataclasses.fields(TrainOptions)}
    options_set = {key: value for key, value in vars(arguments).items() if key in names}
    if arguments.command == "train":
        reader = Reader(reader_config(arguments.reader))
        reader.reset_parameters(arguments.seed)
        Trainer(reader, TrainOptions(**options_set)).run()
        return
    history = json.loads((arguments.source / "config.json").read_text(encoding="utf-8"))["notes"]
    history = history.get("runs", [history])
    if arguments.command == "up-train":
        reader = fido_from_fid(load_reader(arguments.source), arguments.period, arguments.num_kv_heads)
        options = TrainOptions(**options_set, up_training=True, warmup_steps=100)
    else:
        reader = load_reader(arguments.source)
        options = TrainOptions(**options_set, refining=True, warmup_steps=50, average_decay=0.998)
    Trainer(reader, options, history).run()


def _fid_data(arguments: argparse.Namespace) -> None:
    from tokenizers import Tokenizer

    from training.corpus.examples import ExampleSource, Mixture, write_fid_examples
    from training.fit.recipe import PASSAGE_LENGTH

    source = ExampleSource(arguments.corpus, Tokenizer.from_file(str(arguments.corpus / "tokenizer.json")), PASSAGE_LENGTH)
    mixture = Mixture(arguments.n_passages, curated=0.7, counterfactual=0.25, all_renamed=0.6)
    lines = write_fid_examples(source, arguments.out, arguments.examples, mixture, arguments.seed)
    print(f"{arguments.out}: {lines} lines")


def _uptrain(arguments: argparse.Namespace) -> int:
    from export import command_line
    from export.errors import user_errors
    from fido_client.data.examples import ExampleError
    from training.fit.fid_data import DataError
    from training.fit.uptrain import uptrain
    from training.fit.uptrain_options import options_of

    expected: tuple[type[BaseException], ...] = (*user_errors(), ExampleError, DataError)
    try:
        result = uptrain(options_of(arguments), command_line.options(arguments))
    except expected as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    if result:
        print(json.dumps(result))
    return 0


def _evaluate(arguments: argparse.Namespace) -> None:
    import torch
    from tokenizers import Tokenizer

    from export.checkpoint.files import load_reader
    from training.corpus.examples import read_jsonl, write_jsonl
    from training.fit.evaluation import predict, score, scores_by_relation

    reader = load_reader(arguments.checkpoint).to(torch.device(arguments.device)).float()
    tokenizer = Tokenizer.from_file(str(arguments.checkpoint / "tokenizer.json"))
    examples = read_jsonl(arguments.data)[: arguments.limit]
    predictions = []
    for n_passages in arguments.n_passages:
        predictions = predict(reader, tokenizer, examples, n_passages)
        read = [p.gold_read for p in predictions if p.gold_read is not None]
        recall = f", gold passage read {100 * sum(read) / len(read):.1f}%" if read else ""
        print(f"{arguments.data.name}, {n_passages} passages: EM {score(predictions)}{recall}", flush=True)
    for relation, part in scores_by_relation(predictions).items():
        print(f"  {part.em:6.1f} {part.count:4d}  {relation}")
    if arguments.predictions:
        write_jsonl(arguments.predictions, (dataclasses.asdict(prediction) for prediction in predictions))
    print(json.dumps({"em": round(score(predictions).em, 2), "questions": len(predictions), "n_passages": arguments.n_passages[-1]}))


def main() -> None:
    """Run a command."""
    arguments = _parser().parse_args()
    if arguments.command == "corpus":
        from training.corpus.build import build_corpus

        for name, lines in build_corpus(arguments.out).items():
            print(f"{arguments.out / name}: {lines} lines")
    elif arguments.command == "fid-data":
        _fid_data(arguments)
    elif arguments.command == "uptrain":
        sys.exit(_uptrain(arguments))
    elif arguments.command in ("train", "up-train", "refine"):
        _train(arguments)
    elif arguments.command == "evaluate":
        _evaluate(arguments)
    else:
        from training.fit.recipe import run_recipe

        run_recipe(arguments)


if __name__ == "__main__":
    main()
