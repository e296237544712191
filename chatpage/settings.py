"""Every setting, once: its name, its default, what is allowed, and the sentence that explains it.

A setting can be given as a flag (`--block-size 32`), in the environment (`CHATPAGE_BLOCK_SIZE=32`) or as a keyword
argument (`block_size=32`); a flag or keyword wins over the environment. The command line and its help, and the
sentence about a wrong value, are made from the fields below.
"""

import difflib
import ipaddress
import json
import os
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from chatpage import tutor
from chatpage.errors import SettingError

PREFIX = "CHATPAGE_"  # of the settings in the environment
MAX_BLOCK_SIZE = 255  # a block's fill is one byte in snapshots


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_path(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("a text that is not blank")
    return value


def _key(value: str) -> str:
    if not value.isascii() or not value.isprintable() or " " in value or not value:
        raise ValueError("printable ASCII characters without spaces")
    return value


Text = Annotated[str, AfterValidator(_not_blank)]


class Settings(BaseSettings):
    """What one server is started with. Read-only.

    Raises:
        SettingError: a value is wrong, or a keyword or a variable of the environment is unknown; one sentence that
            names it and what is allowed.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True, protected_namespaces=()
    )

    model: Annotated[Text | None, BeforeValidator(_as_path)] = Field(
        None, description="Folder or Hugging Face Hub id of a causal language model; left out, the bundled one."
    )
    system_prompt: Annotated[list[Text], NoDecode, BeforeValidator(_as_list)] = Field(
        default_factory=list,
        description="System prompt that sessions share, computed once at start. May be repeated: the first is the "
        "default. Left out, the model's own.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the model runs; auto prefers a GPU.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto",
        description="Number format of weights, keys and values; auto is bfloat16, else float16, on a GPU, float32 on a "
        "CPU.",
    )
    attention: Literal["auto", "reference", "triton"] = Field(
        "auto",
        description="How attention is computed: by Triton kernels, or by plain PyTorch (reference); auto prefers the "
        "kernels on a GPU.",
    )
    block_size: int = Field(16, ge=1, le=MAX_BLOCK_SIZE, description="Slots (tokens) in one block of the pool.")
    kv_blocks: int | None = Field(
        None,
        ge=1,
        description="Blocks in the pool; left out, what the sequences can fill, as far as --kv-memory allows.",
    )
    kv_memory: float = Field(
        0.85, gt=0, le=1, description="Share for the pool of the memory that the model and its largest step leave free."
    )
    max_model_len: int | None = Field(
        None, ge=2, description="Longest prompt and answer together, in tokens; left out, the model's own limit."
    )
    max_sequences: int = Field(256, ge=1, le=4096, description="Sequences that may run at once.")
    # A CUDA grid has at most so many programs along its second axis.
    max_step_tokens: int = Field(
        2048, ge=1, le=2**16 - 1, description="Tokens that one step may compute over all sequences."
    )
    max_output_tokens: int | None = Field(
        None, ge=1, description="Longest answer, in tokens; left out, to the end of the context."
    )
    max_queue: int = Field(
        64, ge=1, le=2**16, description="Requests taken beyond --max-sequences; one more is refused as busy."
    )
    session_ttl: float = Field(
        300.0, gt=0, le=10**6, description="Seconds that a silent session keeps its blocks between turns."
    )
    sharing: Literal["auto", "system", "all", "off"] = Field(
        "auto",
        description="What sessions share: system prompts only, all identical text, or nothing; auto is all on "
        "loopback, system elsewhere.",
    )
    panel_scope: Literal["auto", "full", "aggregate", "self", "off"] = Field(
        "auto",
        description="What the panel shows of other sessions: full, aggregate (whole blocks, half a second late), "
        "self (only totals), off (no panel data); auto is full on loopback, aggregate elsewhere.",
    )
    api_key: Annotated[str, AfterValidator(_key)] | None = Field(
        None, repr=False, description="Key that clients of /v1 and /metrics must send; left out, none is asked for."
    )
    host: Text = Field(
        default_factory=lambda: "0.0.0.0" if os.environ.get("SPACE_ID") else "127.0.0.1",
        description="Address to listen on; 0.0.0.0 is every address of this machine, and the default in a Space.",
    )
    port: int = Field(7860, ge=0, le=65535, description="Port to listen on; 0 takes any free one.")
    trace: Annotated[Text | None, BeforeValidator(_as_path)] = Field(
        None, description="File to record every event in, as JSON lines; it is overwritten."
    )
    paranoid: bool = Field(False, description="Prove the invariants of the cache after every step (slow).")

    def __init__(self, **values: Any) -> None:
        _require_known_variables()
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SettingError(_sentence(error.errors()[0])) from None

    def require_possible(self) -> None:
        """Refuse what can be known to be wrong before anything is loaded, and before the port is taken.

        Raises:
            SettingError: the model's folder is not there, the trace's neither, or the context is longer than either the
                model or the pool allows.
        """
        model, longest = self._model_folder(), self.max_model_len
        if self.trace and not os.path.isdir(os.path.dirname(self.trace) or "."):
            raise SettingError(f"--trace is {self.trace!r}; it must be a file in a folder that exists.")
        if self.trace and os.path.isdir(self.trace):
            raise SettingError(f"--trace is {self.trace!r}, which is a folder; it must be a file.")
        if longest is None:
            return
        positions = _most_positions(model) if model else None
        if positions and longest > positions:
            raise SettingError(f"--max-model-len is {longest}, but this model's contexts end at {positions} tokens.")
        needed = -(-longest // self.block_size)
        if self.kv_blocks is not None and self.kv_blocks < needed:
            raise SettingError(
                f"--kv-blocks is {self.kv_blocks}, but one sequence of --max-model-len {longest} tokens takes {needed} "
                f"blocks of {self.block_size}."
            )

    def _model_folder(self) -> Path | None:
        """The folder of the model; None for an id of the Hub."""
        if self.model is None:
            return tutor.path()
        folder = Path(self.model).expanduser()
        if folder.is_dir() and not (folder / "config.json").exists():
            raise SettingError(f"--model is {self.model!r}, a folder without config.json; it must hold a model.")
        if not folder.is_dir() and (folder.exists() or self.model.startswith((".", "/", "~"))):
            raise SettingError(f"--model is {self.model!r}; it must be a folder that exists, or an id of the Hub.")
        return folder if folder.is_dir() else None

    @property
    def on_loopback(self) -> bool:
        """Whether only programs on this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def resolved_sharing(self) -> Literal["system", "all", "off"]:
        if self.sharing != "auto":
            return self.sharing
        return "all" if self.on_loopback else "system"

    @property
    def resolved_scope(self) -> Literal["full", "aggregate", "self", "off"]:
        if self.panel_scope != "auto":
            return self.panel_scope
        return "full" if self.on_loopback else "aggregate"


def _require_known_variables() -> None:
    """Refuse CHATPAGE_… in the environment that is no setting: it would be without effect."""
    for variable in os.environ:
        name = variable.lower().removeprefix(PREFIX.lower())
        if variable.upper().startswith(PREFIX) and name not in Settings.model_fields:
            near = PREFIX + nearest(name).upper()
            raise SettingError(f"{variable} in the environment is not a setting; did you mean {near}?")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def allowed(name: str) -> str:
    """What a setting may be, in words: `a whole number from 1 to 255`."""
    field = Settings.model_fields[name]
    kind = _plain_type(field.annotation)
    if get_origin(kind) is Literal:
        choices = [str(choice) for choice in get_args(kind) if (name, choice) != ("attention", "triton")]
        return f"{', '.join(choices[:-1])} or {choices[-1]}"
    if kind in (int, float):
        return ("a whole number" if kind is int else "a number") + _range(field)
    return "on or off" if kind is bool else "text"


def nearest(name: str) -> str:
    """The known setting that a misspelt name most likely meant."""
    names = list(Settings.model_fields)
    return difflib.get_close_matches(name, names, n=1, cutoff=0)[0]


def _most_positions(model: Path) -> int | None:
    """The longest context by the model's configuration, if it sets a limit. Loading may find a lower one."""
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        text = config.get("text_config", config)
        positions = text.get("max_position_embeddings")
        rope = str(text.get("rope_parameters") or text.get("rope_scaling"))
    except (OSError, ValueError, AttributeError):  # loading says what is wrong with it
        return None
    can_be_longer = "'dynamic'" in rope  # this kind of RoPE is made for the length that is wished
    return positions if isinstance(positions, int) and not can_be_longer else None


def _plain_type(annotation: Any) -> Any:
    """The type without `Annotated` and `None`: `Annotated[int, ...] | None` is `int`."""
    while get_origin(annotation) in (Annotated, Union, UnionType):
        annotation = next(part for part in get_args(annotation) if part is not NoneType)
    return annotation


def _range(field: FieldInfo) -> str:
    """The field's bounds in words, with the space that goes before: ` from 1 to 255`."""
    low = next((part.ge for part in field.metadata if isinstance(part, Ge)), None)
    above = next((part.gt for part in field.metadata if isinstance(part, Gt)), None)
    high = next((part.le for part in field.metadata if isinstance(part, Le)), None)
    if above is not None:
        return f" above {above} and at most {high}"
    return f" from {low}" + (f" to {high}" if high is not None else " up")


def _sentence(error: Any) -> str:
    """One sentence about the first thing that pydantic found wrong."""
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        return f"{name} is not a setting; did you mean {nearest(name)}?"
    asked = str(error["ctx"]["error"]) if error["type"] == "value_error" else allowed(name)
    if name == "api_key":
        return f"{flag(name)} must be {asked}."  # never print a secret, even a wrong one
    return f"{flag(name)} is {error['input']!r}; it must be {asked}."
