"""From a jcard on disk to a spec that admission accepts, with its sources packed. Offline: asks nobody."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from fleet.errors import InvalidSpecError, NotFoundError
from fleet.model.admission import FieldRefusal
from fleet.model.sandbox import SandboxSpec
from fleet.model.secret import SecretValue
from mb.jcard.model import Jcard, JcardError, Shared
from mb.jcard.parse import parse_jcard
from mb.jcard.paths import FILE_BYTES_MAX
from mb.jcard.to_spec import UNPACKED, find_faults, to_spec
from mb.pack import Packed, pack_folder

JCARD_FILE = "jcard.toml"


@dataclass(frozen=True, slots=True)
class PackedSource:
    """One shared folder, packed; `stream` holds its tar when it was asked for."""

    shared: Shared
    packed: Packed
    stream: BinaryIO | None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A jcard that became a spec; the values of its secrets go their own way."""

    path: Path
    spec: SandboxSpec
    sources: tuple[PackedSource, ...]
    notes: tuple[str, ...]
    secrets: Mapping[str, SecretValue]

    def reveal_secrets(self) -> dict[str, bytes]:
        """The values of the spec's secrets, to be sent and forgotten."""
        return {name: value.reveal() for name, value in self.secrets.items()}


@contextmanager
def prepared(path: Path, *, name: str = "", keep_tars: bool = False) -> Iterator[Prepared]:
    """The spec of the jcard at `path` (a file, or a folder with one); the packed tars last as long as the context.

    Raises NotFoundError `jcard_missing`, or JcardError with every fault.
    """
    file = _file_of(path)
    jcard = _load(file, os.environ)
    if name:
        jcard = _rename(jcard, name)
    with ExitStack() as stack:
        sources: list[PackedSource] = []
        faults: list[FieldRefusal] = []
        for shared in jcard.shared:
            stream = stack.enter_context(tempfile.TemporaryFile()) if keep_tars else None
            source = _pack(shared, stream, faults)
            sources.append(PackedSource(shared, source, stream))
        jcard = replace(jcard, faults=(*jcard.faults, *faults))
        spec = to_spec(jcard, [source.packed for source in sources])
        found = find_faults(jcard, spec)
        if found:
            raise JcardError(file, found)
        yield Prepared(file, spec, tuple(sources), jcard.notes, jcard.secrets)


def load_jcard(path: Path, *fields: str) -> Jcard:
    """The jcard at `path` for its `fields` alone, unpacked; raises JcardError for faults in these, or in its syntax."""
    file = _file_of(path)
    jcard = _load(file, os.environ)
    faults = [fault for fault in jcard.faults if fault.field.split(".")[0] in ("", *fields)]
    if faults:
        raise JcardError(file, faults)
    return jcard


def has_jcard(path: Path) -> bool:
    """Whether `path` is a jcard or a folder with one."""
    return _file_of(path).is_file()


def _file_of(path: Path) -> Path:
    return path / JCARD_FILE if path.is_dir() else path


def _load(file: Path, environment: Mapping[str, str]) -> Jcard:
    try:
        with file.open("rb") as stream:
            content = stream.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        next_step = "write one with mb init, or name its folder"
        raise NotFoundError("jcard_missing", f"{file}: {error.strerror}", next_step) from error
    if len(content) > FILE_BYTES_MAX:
        raise InvalidSpecError("jcard_invalid", f"{file} is larger than 1 MiB", "name a jcard")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidSpecError("jcard_invalid", f"{file} is not UTF-8 text", "name a jcard") from error
    return parse_jcard(text, file.absolute().parent, environment)


def _rename(jcard: Jcard, name: str) -> Jcard:
    faults = tuple(fault for fault in jcard.faults if fault.field != "name")
    notes = tuple(note for note in jcard.notes if not note.startswith("name "))
    return replace(jcard, spec=replace(jcard.spec, name=name), faults=faults, notes=notes)


def _pack(shared: Shared, stream: BinaryIO | None, faults: list[FieldRefusal]) -> Packed:
    try:
        return pack_folder(shared.host, stream)
    except InvalidSpecError as error:
        faults.append(FieldRefusal(shared.field, error.code, error.message, error.next_step))
        return UNPACKED
