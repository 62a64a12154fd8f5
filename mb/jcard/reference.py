"""The reference page of jcards, made of the model: `python -m mb.jcard.reference > docs/jcard.md`."""

import sys

from fleet.model.admission import CUSTOM, HARNESSES
from mb.jcard.field import Field
from mb.jcard.fields import FIELDS
from mb.jcard.harness import load_harness

_HEAD = """\
# `jcard.toml`

<!-- Made by `python -m mb.jcard.reference > docs/jcard.md`; edit mb/jcard/fields.py and run it again. -->

The file beside a source tree that says what a sandbox is made of. `mb` alone reads it and turns it into a spec; `mb check` prints
that spec. Whatever is written is honoured or refused: an unknown key, a wrong type and an unset `${VAR}` are errors, all told at
once, each with file, field, value and what would be right. Sizes are written with B, KiB, MiB, GiB or TiB (`"1.5GiB"`), durations
as in `"1m30s"`. What stereOS does not have is marked (ours). Fields in *italics* are refused as their row says.
"""

_TAIL = """\
## What is packed
Everything in a shared folder, `.git` too, as a canonical tar: sorted, without owners and times, with mode 755 or 644, so that the
same tree has the same digest everywhere. Symlinks travel as they are. Sockets, devices, fifos and names that are not UTF-8 are
errors. At most 2 GiB, 200,000 paths, 64 folders deep, 4096 bytes a path.

A file `.bedplateignore` at the top of the folder lists what stays behind, a small part of `.gitignore`:
- one pattern a line; blank lines and lines that begin with `#` say nothing; spaces at the end are cut;
- `*` is any characters but `/`, `?` one of them, `**` as a whole part any number of folders; all else stands for itself;
- a pattern with `/` before its end is matched from the top of the folder, any other against the name at every depth;
- `/` at the end means folders only; what lies in an ignored folder is ignored too;
- `!` is an error: there is no taking back.
"""

_HARNESSES = """\
## Harnesses
A harness is a data file (`mb/harnesses/NAME.toml`) that turns a prompt into a command. `custom` has none: it runs `command`, or
the program `agent` with the prompt as its argument. A key is written under `[secrets]`; the program gets it as the environment
variable of the same name, read from the secret's file when it starts. No image has these programs yet: build one that has, or the
agent ends with its program not found. Nothing leaves a sandbox yet, so their destinations cannot be reached; `mb check` notes both.

| harness | runs | in a session without a prompt | key | needs |
|---|---|---|---|---|
"""

_PROOFS = """\

## What proves it
Each field, and the tests that prove it honoured or refused.

| field | proved by |
|---|---|
"""


def render_reference() -> str:
    """The whole page."""
    return "".join([_HEAD, _render_fields(), "\n", _HARNESSES, *_render_harnesses(), "\n", _TAIL, *_render_proofs()])


def written(field: Field) -> str:
    """A field as a jcard has it: `[resources] cpus`, `[[shared]] host`."""
    table, _, key = field.name.rpartition(".")
    if not table:
        return {"agent": "`[agent]`", "agents": "`[[agents]]`", "shared": "`[[shared]]`"}.get(key, f"`{key}`")
    if table == "agent.env":
        return "`env` NAME"
    lists = ("shared", "network.forwards")
    head = f"[[{table}]]" if table in lists else f"[{table}]"
    return f"`{head}` NAME" if key == "*" else f"`{head} {key}`"


def _render_fields() -> str:
    sections: dict[str, list[str]] = {"": [], "\n## Of an agent\n": []}
    for field in FIELDS:
        title = "\n## Of an agent\n" if field.name.startswith("agent.") else ""
        sections[title].append(_render_field(field))
    head = "\n| field | type | default | limits | meaning |\n|---|---|---|---|---|\n"
    return "".join(title + head + "".join(rows) for title, rows in sections.items())


def _render_field(field: Field) -> str:
    text = f"*{field.text}*" if field.refused else field.text
    name = f"`{field.name.removeprefix('agent.')}`" if field.name.startswith("agent.") else written(field)
    if field.name == "agent.env.*":
        name = written(field)
    return f"| {name}{' (ours)' if field.ours else ''} | {field.kind} | {field.default} | {field.limits} | {text} |\n"


def _render_harnesses() -> list[str]:
    rows = []
    for name in HARNESSES:
        if name == CUSTOM:
            continue
        harness = load_harness(name)
        told, alone = " ".join(harness.command("PROMPT", ())), " ".join(harness.command("", ()))
        keys = " or ".join(f"`{key}`" for key in harness.keys)
        rows.append(f"| `{name}` | `{told}` | `{alone}` | {keys} | {', '.join(harness.destinations)} |\n")
    return rows


def _render_proofs() -> list[str]:
    rows = [_PROOFS]
    for field in FIELDS:
        tests = "<br>".join(f"`{test.removeprefix('tests/')}`" for test in field.tests)
        rows.append(f"| {written(field)} | {tests} |\n")
    return rows


if __name__ == "__main__":
    sys.stdout.write(render_reference())
