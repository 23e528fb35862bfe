"""NAC as a family of students: what the trainer asks of each (trainer/teaching/families.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import saved
from ..files.hub import CheckpointFiles
from ..forms import StudentForm
from ..modules.basis import Basis
from ..modules.tokens import TokenLayout
from ..preprocessing import Preprocessing
from .circuit import circuit
from .config import NACConfig, decode_preset
from .files import FORMAT
from .model import NAC
from .students import NACModule, student_modules

ALIGNED = False
ENDS = 1  # read-in and read-out
STITCHES = ("drop",)
KEPT = (0.5, 0.25, 0.1)  # shares of the mediators that a student is measured with as well
OF_MODULES = ("preset", "read_in", "mediator")  # settings that are no field of the model's configuration


def config(
    section: Mapping[str, Any],
    *,
    num_classes: int,
    drop_path: float,
    image_size: int,
    in_chans: int,
    tokens: TokenLayout,
    seed: int,
    teacher_width: int = 0,
) -> NACConfig:
    """The NAC that section student of a recipe asks for; the teacher's tokens mean nothing to it.

    Raises:
        ValueError: an unknown preset, or sizes that are open or make no model.
    """
    circuit = section["nac"]
    sizes = decode_preset(circuit["preset"]) if circuit["preset"] else {}
    asked = {name: value for name, value in circuit.items() if value is not None and name not in OF_MODULES}
    required = {"state_dim", "code_dim", "heads", "input_latents", "mediator_latents", "output_latents", "ffn_factor"}
    missing = [f.name for f in fields(NACConfig) if f.name in required - sizes.keys() - asked.keys()]
    if missing:
        raise ValueError(f"student.nac.preset is empty and student.nac.{missing[0]} is not set: set one of them.")
    about_images = {"num_classes": num_classes, "image_size": image_size, "in_chans": in_chans}
    return NACConfig(**(sizes | asked | about_images), drop_path_rate=drop_path, seed=seed)


def build(config: NACConfig) -> NAC:
    """A NAC with new weights, drawn from config.seed, its signatures fitted to its graph."""
    return NAC(config)


def modules(
    student: NAC,
    depths: Sequence[int],
    teacher_width: int,
    seed: int,
    stitches: str,
    bases: Sequence[Basis] | None,
    *,
    section: Mapping[str, Any],
    tokens: int,
) -> list[NACModule]:
    """See student_modules."""
    receivers = tokens if section["nac"]["read_in"] == "tokens" else 1
    one_layer = section["nac"]["mediator"] == "one"
    return student_modules(student, depths, teacher_width, seed, receivers, one_layer)


def assemble(modules: Sequence[NACModule], stitches: str, states: Sequence[Tensor] | None) -> NAC:
    """The NAC whose parts the modules are, their stitches left behind."""
    for module in modules:
        module.hand_over()
    return modules[0].whole


def forms(student: NAC) -> list[StudentForm]:
    """The student, and the same with its best connected mediators only."""
    count = student.config.mediator_latents
    found = [StudentForm("all mediators", student, trained=True)]
    for share in KEPT:
        pruned = student.pruned(max(1, round(share * count)))
        found.append(StudentForm(f"{share:.0%} of the mediators", pruned, kept=f"{share:.0%}"))
    return found


def rivals(student: NAC) -> dict[str, NAC]:
    """Nobody but its teacher."""
    return {}


def describe(student: NAC, images: Tensor) -> dict[str, Any]:
    """The circuit: see circuit."""
    return {"circuit": circuit(student, images)}


def read_config(files: CheckpointFiles) -> tuple[NACConfig, Preprocessing | None, list[str] | None]:
    """Configuration, preprocessing and class names of a saved NAC.

    Raises:
        ValueError: not one of ours.
    """
    return saved.read(FORMAT, files)


def write_config(folder: Path, config: NACConfig, preprocessing: Preprocessing, labels: Sequence[str]) -> None:
    """Write config.json alone: with weights beside it the folder is a NAC."""
    saved.write_config(folder, saved.content(FORMAT, config, preprocessing, labels))


def load(source: str, *, config: NACConfig | None = None, ep_size: int = 1, ep_rank: int = 0) -> NAC:
    """A saved NAC in evaluation mode.

    Raises:
        ValueError: see NAC.from_pretrained; or an ep_size above 1, as it has no experts.
    """
    if ep_size != 1:
        raise ValueError(f"a NAC has no experts to share among ranks: ep_size must be 1, got {ep_size}.")
    return NAC.from_pretrained(source, config=config)
