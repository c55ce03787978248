"""manifest.json in the engines' directory: what serving must know of a checkpoint, and a hash of every file.

In: the file that export/ wrote. Out: a `Manifest`, and the content of the other files once their hashes are checked. Serving needs neither
torch nor the checkpoint. This module loads no engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from .gemms import StackSizes
from .library_kernels import EncoderLibrary
from .tensors import EngineSizes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORMAT = 4  # raised whenever serving code of an earlier format would misunderstand a manifest
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
FLOAT8 = "float8"  # e4m3
FP8_CAPABILITY = 89  # 10 * the first compute capability whose instructions convert e4m3
ENGINE_NAMES = ("encoder", "cross_kv", "decoder_step")
SUFFIXES = {"onnxruntime": ".onnx", "openvino": ".onnx", "onnxruntime-gpu": ".onnx", "tensorrt": ".plan"}  # of engine files, by backend
CPU_ENGINES = ("onnxruntime", "openvino")
CPU_INFO = Path("/proc/cpuinfo")
BF16_FLAGS = ("avx512_bf16", "amx_bf16")  # of CPU_INFO: instructions that multiply bf16; without both it is emulated, slower than fp32
REBUILD = "`make export ENGINE=tensorrt` builds it again"


class ManifestError(ValueError):
    """Engine files that are missing, altered, or do not belong together."""


class EngineError(RuntimeError):
    """An engine that cannot be loaded or run here, or whose tensors are not those of its manifest."""


def token_without_embedding(tokenizer: Tokenizer, vocab_size: int) -> int | None:
    """The largest token id if it has no row in an embedding of `vocab_size` rows, else None. Checked at export and at load."""
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    return largest if largest >= vocab_size else None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """How a question and a passage become encoder input.

    Attributes:
        template: text with the fields {question}, {title} and {context}; what precedes {title}, or {context}, is never truncated.
        passage_length: largest number of tokens, the end token included.
        append_eos: whether every input ends with the end token.
        template_without_title: text for a passage without a title; None uses `template` with an empty title.
        end_token_id: ends the inputs; None for the reader's eos_token_id, at which it stops.
    """

    template: str
    passage_length: int
    append_eos: bool
    template_without_title: str | None = None
    end_token_id: int | None = None

    def text(self, question: str, title: str, context: str) -> str:
        """The encoder input of one passage, before it is tokenized."""
        return self._template_for(title).format(question=question, title=title, context=context)

    def head(self, question: str, title: str) -> str:
        """The part of `text` that is never truncated: all before the title and the passage."""
        template = self._template_for(title)
        ends = [template.index(field) for field in ("{title}", "{context}") if field in template]
        return template[: min(ends, default=len(template))].format(question=question)

    def _template_for(self, title: str) -> str:
        return self.template if title or self.template_without_title is None else self.template_without_title


class BuildTarget(NamedTuple):
    """What a compiled engine depends on besides its graph: it runs only where all three are the same.

    Attributes:
        gpu: name of the GPU, for example "NVIDIA H200".
        compute_capability: for example "9.0".
        version: of TensorRT, for example "8.6.0".
    """

    gpu: str
    compute_capability: str
    version: str


@dataclasses.dataclass(frozen=True)
class EngineBuild:
    """How compiled engines were built.

    Attributes:
        gpu, compute_capability, version: as in BuildTarget.
        profiles: engine file -> its optimization profiles, each input name -> (min, opt, max) shapes.
        seconds: engine file -> build time in seconds.
    """

    gpu: str
    compute_capability: str
    version: str
    profiles: dict[str, list[dict[str, tuple[tuple[int, ...], ...]]]]
    seconds: dict[str, float]

    def require_target(self, file: str, here: BuildTarget) -> None:
        """Refuse an engine that was built for another GPU or TensorRT: it would fail to load or, worse, run slowly.

        Args:
            file: path of the engine, for the message.
            here: the GPU and the TensorRT of this process.

        Raises:
            EngineError: naming every difference.
        """
        built = BuildTarget(self.gpu, self.compute_capability, self.version)
        names = ("GPU", "compute capability", "TensorRT")
        faults = [
            f"{name}: built for {wanted}, here {found}" for name, wanted, found in zip(names, built, here, strict=True) if wanted != found
        ]
        if faults:
            raise EngineError(f"{file}: {'; '.join(faults)}; {REBUILD}")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> EngineBuild:
        """The inverse of dataclasses.asdict, also after a round trip through JSON."""
        profiles = {
            file: [{name: tuple(tuple(shape) for shape in shapes) for name, shapes in profile.items()} for profile in listed]
            for file, listed in fields["profiles"].items()
        }
        return cls(**{**fields, "profiles": profiles})


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json.

    Attributes:
        reader: "fid" or "fido".
        engine: the backend that runs the engines: "onnxruntime" or "openvino" (CPU), "onnxruntime-gpu" or "tensorrt".
        precision: dtype of weights and activations: "float32", "float16" or "bfloat16"; on a CPU also "int8", and for OpenVINO "int8-bf16"
            where the rest is bf16. Hidden states of GPU engines are float16 always, those of CPU engines float32.
        files: name -> SHA-256 of every file of the reader.
        weights_sha256: of the checkpoint's weights; engines of one checkpoint have the same.
        provenance: source, versions, opset; for people, not read by serving.
        encoder, decoder: sizes of a stack that consists of GEMMs (gemms.py); None if the stack is one graph.
        build: how compiled engines were built; None if they were not compiled.
        encoder_library: the encoder's GEMMs as library kernels, in place of engines; they run only on GPUs of their architecture.
        cross_kv_precision: of cross-attention's keys and values on a GPU: "float16", or "float8" (e4m3, with scales in a file).
    """

    reader: str
    engine: str
    precision: str
    sizes: EngineSizes
    prompt: Prompt
    pad_token_id: int
    eos_token_id: int
    decoder_start_token_id: int
    files: dict[str, str]
    weights_sha256: str
    provenance: dict[str, Any]
    encoder: StackSizes | None = None
    decoder: StackSizes | None = None
    build: EngineBuild | None = None
    encoder_library: EncoderLibrary | None = None
    cross_kv_precision: str = "float16"

    @property
    def on_gpu(self) -> bool:
        """Whether the engines run on a GPU."""
        return self.engine not in CPU_ENGINES

    @property
    def is_whole(self) -> bool:
        """Whether encoder, cross_kv and decoder_step are one GPU engine each."""
        return self.on_gpu and self.decoder is None and self.engine_file("decoder_step") in self.files

    def engine_file(self, name: str) -> str:
        """File name of the engine called `name`."""
        own = self.engine == "openvino" and self.precision.startswith("int8")  # OpenVINO's own files hold them, `NAME.xml` and `NAME.bin`
        return name + (".xml" if own else SUFFIXES[self.engine])

    @property
    def has_bf16_caches(self) -> bool:
        """Whether a CPU engine computes in bf16 and keeps its keys and values so."""
        return self.engine in CPU_ENGINES and self.precision in ("bfloat16", "int8-bf16")

    def to_json(self) -> str:
        """The text of manifest.json; it contains a hash of its other fields."""
        fields = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps({**fields, "sha256": _sha256_of_fields(fields)}, indent=2) + "\n"

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Read `directory`/manifest.json.

        Raises:
            ManifestError: if it is missing, not JSON, of another format, altered, or has other fields.
        """
        path = directory / MANIFEST_FILE
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ManifestError(f"{path}: missing; `make export` makes the engines and their manifest") from None
        except (ValueError, OSError) as error:
            raise ManifestError(f"{path}: unreadable ({error}); `make export` makes it again") from error
        found = fields.get("format") if isinstance(fields, dict) else None
        if found != FORMAT:
            raise ManifestError(f"{path}: format: wanted {FORMAT}, got {found!r}; `make export` makes it again")
        wanted, actual = fields.pop("sha256", None), _sha256_of_fields(fields)
        if wanted != actual:
            raise ManifestError(f"{path}: its SHA-256: wanted {wanted}, got {actual}: it was altered; `make export` makes it again")
        del fields["format"]
        try:
            sizes = {**fields["sizes"], "cross_attention_layers": tuple(fields["sizes"]["cross_attention_layers"])}
            build = EngineBuild.from_dict(fields["build"]) if fields.get("build") else None
            stacks = {name: StackSizes(**fields[name]) for name in ("encoder", "decoder") if fields.get(name)}
            library = EncoderLibrary.from_dict(fields["encoder_library"]) if fields.get("encoder_library") else None
            parsed = {"sizes": EngineSizes(**sizes), "prompt": Prompt(**fields["prompt"]), "build": build, "encoder_library": library}
            return cls(**{**fields, **stacks, **parsed})
        except (KeyError, TypeError) as error:
            raise ManifestError(f"{path}: other fields than wanted ({error}); `make export` makes it again") from error

    def verify(self, directory: Path, names: Sequence[str]) -> None:
        """Check that the files called `names` are there and unaltered, with the weights beside them (`encoder.onnx.data`, `encoder.bin`).

        Code that loads a file afterwards uses `verified` or `read` instead: the file might change in between.

        Raises:
            ManifestError: naming every missing and every altered file.
        """
        with self.verified(directory, names):
            pass

    @contextlib.contextmanager
    def verified(self, directory: Path, names: Sequence[str]) -> Iterator[None]:
        """Check files as `verify` does, for a block that lets a library open them by their paths.

        The check covers what the library loads: the block is refused if a file was replaced or written to while it ran.

        Raises:
            ManifestError: naming every missing, altered or replaced file.
        """
        # the weights of an ONNX graph above 2 GB are in .data, those of OpenVINO's encoder.xml in encoder.bin
        wanted = {*names, *(f"{name}.data" for name in names), *(name[:-4] + ".bin" for name in names if name.endswith(".xml"))}
        faults = [f"{name}: not in {MANIFEST_FILE}" for name in names if name not in self.files]
        states = {}
        for file in (file for file in self.files if file in wanted):
            try:
                with (directory / file).open("rb") as opened:
                    states[file] = _state(os.fstat(opened.fileno()))
                    faults += self._altered(file, _sha256(opened))
            except OSError as error:
                faults.append(_unreadable(file, error))
        _raise_faults(directory, faults)
        yield
        for file, state in states.items():
            try:
                if _state((directory / file).stat()) != state:
                    faults.append(f"{file}: replaced or written to while it was loaded")
            except OSError as error:
                faults.append(_unreadable(file, error))
        _raise_faults(directory, faults)

    def read(self, directory: Path, file: str) -> bytes:
        """The content of a file, read once and checked.

        Raises:
            ManifestError: if the file is missing, altered or not in the manifest.
        """
        content = b""
        if file not in self.files:
            faults = [f"{file}: not in {MANIFEST_FILE}"]
        else:
            try:
                content = (directory / file).read_bytes()
                faults = self._altered(file, hashlib.sha256(content).hexdigest())
            except OSError as error:
                faults = [_unreadable(file, error)]
        _raise_faults(directory, faults)
        return content

    def _altered(self, file: str, found: str) -> list[str]:
        wanted = self.files[file]
        return [] if found == wanted else [f"{file}: SHA-256 wanted {wanted[:16]}..., got {found[:16]}..."]


def require_bf16(what: str, cpuinfo: Path = CPU_INFO) -> None:
    """Refuse bf16 on a CPU that would emulate it.

    Args:
        what: needs bf16, for the message.
        cpuinfo: the kernel's description of the processor.

    Raises:
        EngineError: if the CPU has none of BF16_FLAGS, or does not say.
    """
    if not {*BF16_FLAGS} & {*_cpu(cpuinfo).get("flags", "").split()}:
        raise EngineError(
            f"{what}: bf16: wanted a CPU with {' or '.join(BF16_FLAGS)}, got {cpu_name(cpuinfo)} without them, which would emulate it, "
            "slower than fp32; `make export PRECISION=fp32` makes engines for every CPU"
        )


def cpu_name(cpuinfo: Path = CPU_INFO) -> str:
    """What the first processor calls itself, as "AMD EPYC 9004"."""
    return _cpu(cpuinfo).get("model name", "an unknown CPU")


def _cpu(cpuinfo: Path) -> dict[str, str]:
    """The fields of the first processor; none where the system does not say."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _unreadable(file: str, error: OSError) -> str:
    return f"{file}: missing" if isinstance(error, FileNotFoundError) else f"{file}: cannot be read ({error.strerror})"


def _raise_faults(directory: Path, faults: Sequence[str]) -> None:
    if faults:
        raise ManifestError(
            f"{directory}: engine files do not match {MANIFEST_FILE}; `make export` makes them again:\n  " + "\n  ".join(faults)
        )


def _state(stat: os.stat_result) -> tuple[int, ...]:
    """What changes when a path is given to another file, or when its file is written to."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _sha256_of_fields(fields: dict[str, Any]) -> str:
    """Hash of a manifest's fields, independent of the layout of the file."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return _sha256(file)


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
