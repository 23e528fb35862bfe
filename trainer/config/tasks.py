"""An evaluation as it is written, NAME[:key=value,...], checked and taken apart. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from trainer.config.data import BUILT_IN, DataConfig
from trainer.config.evaluate import PRESETS, SETTINGS, ImagesConfig
from trainer.config.knobs import close
from trainer.config.load import build, first_repeated, parse_override, to_dict

DATA = "data."  # a setting that begins so is a key of section data


@dataclass(frozen=True)
class TaskSpec:
    """One evaluation that is asked for.

    Attributes:
        name: of the evaluation, or of the known set of images.
        text: as it was written.
        kind: the evaluation; a file of trainer/judge/ has this name.
        images: keys of section data that it sets.
    """

    name: str
    text: str
    kind: str
    settings: ImagesConfig
    images: dict[str, Any]

    def data(self, default: DataConfig) -> DataConfig:
        """The images it is made on.

        Raises:
            ValueError: settings of section data that are none.
        """
        values = to_dict(DataConfig() if self.settings.data else default)
        if self.settings.data:
            where = "source" if self.settings.data in BUILT_IN else "path"
            values[where] = self.settings.data
        for key, value in self.images.items():
            section = values
            *path, name = key.split(".")
            for part in path:
                section = section.setdefault(part, {})
                if not isinstance(section, dict):
                    raise ValueError(f"evaluation {self.text!r}: {DATA}{part} is a value, not a section")
            section[name] = value
        return build(DataConfig, values, DATA)


def parse_tasks(texts: Sequence[str]) -> list[TaskSpec]:
    """Evaluations in the order they are written.

    Raises:
        ValueError: no such evaluation or setting (the close ones are named), a value out of range, or the same twice.
    """
    repeated = first_repeated(list(texts))
    if repeated is not None:
        raise ValueError(f"the evaluation {repeated!r} is asked for twice: leave one out")
    return [parse_task(text) for text in texts]


def parse_task(text: str) -> TaskSpec:
    """The same of one."""
    name, _, written = text.partition(":")
    if name not in SETTINGS and name not in PRESETS:
        known = (*SETTINGS, *PRESETS)
        raise ValueError(f"evaluation {name!r} is not known. {close(name, known)}")
    kind, given = name, {}
    if name in PRESETS:
        kind, given = PRESETS[name].task, dict(PRESETS[name].settings)
    for part in _parts(written):
        path, value = parse_override(part)
        given[".".join(path)] = value
    images = {key.removeprefix(DATA): value for key, value in given.items() if key.startswith(DATA)}
    own = {key: value for key, value in given.items() if not key.startswith(DATA)}
    known = [item.name for item in fields(SETTINGS[kind])]
    for key in own:
        if key not in known:
            raise ValueError(f"evaluation {name!r} has no setting {key!r}. {close(key, known)}, or data.KEY")
    try:
        settings = build(SETTINGS[kind], own)
    except ValueError as error:
        raise ValueError(f"evaluation {text!r}: {error}") from None
    stored = getattr(settings, "stored", "")
    if name in PRESETS and PRESETS[name].where and not (settings.data or stored):
        needed = "stored" if kind == "corruptions" else "data"
        raise ValueError(
            f"evaluation {name!r} has no images of its own on the hub: unpack those of {PRESETS[name].where} and write "
            f"{name}:{needed}=FOLDER"
        )
    spec = TaskSpec(name, text, kind, settings, images)
    spec.data(DataConfig())  # its own keys are checked now
    return spec


def _parts(text: str) -> list[str]:
    """Settings between commas, but for the commas in brackets."""
    parts = [""]
    depth = 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part.strip()]
