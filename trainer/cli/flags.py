"""The command line: its flags, what may be given together, and the words about what is wrong. No torch here."""

from __future__ import annotations

import argparse
import difflib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from trainer.cli import manual
from trainer.cli.replay import Saved, read_saved
from trainer.config.ds_config import ds_origins, read_ds_config
from trainer.config.knobs import close
from trainer.config.load import all_keys, load_recipe, origins
from trainer.request.graph import ALL, phase_help
from trainer.request.job import Job
from trainer.request.plan import DEFAULTS, PLAN, PlanRequest, over_the_mean, whole

# flags that a command needs; others have no meaning for it
COMMAND_FLAGS = {"inspect": (), "export": ("out",), "import": ("layout", "out")}
PLAN_FLAGS = ("nodes", "gpus", "gpu", "images", "classes", "box_images", "categories", "busiest")
IMPORT_SETTINGS = ("heads", "k")  # whole numbers behind the path
NEEDED = "--recipe is needed (or --config OUT/PHASE/config.yaml, or OUT, to repeat a run)"
PROFILED_STEPS = 10  # by --profile
DS_CONFIG = Path(__file__).resolve().parents[2] / "ds_configs/one_machine.json"  # where none is given


class _Parser(argparse.ArgumentParser):
    """Its errors are ValueErrors, so that a wrong flag is reported like every other bad input."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parser() -> argparse.ArgumentParser:
    """Every flag with its line of help."""
    flags = _Parser(
        prog="trainer/run.py",
        usage="deepspeed --num_gpus N trainer/run.py --recipe R [--ds_config J] [--phase P] --out OUT [KEY=VALUE ...]\n"
        "       trainer/run.py inspect|export|import ... (below)",
        description="m2mKD: teach a modular student module by module, then train it end to end.",
        epilog=manual.overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    flags.add_argument("--recipe", help="recipes/*.yaml: what is trained")
    flags.add_argument("--ds_config", help=f"ds_configs/*.json: how it is spread over ranks (default {DS_CONFIG.name})")
    flags.add_argument("--phase", help=f"{', '.join(phase_help())} (default); or {PLAN}, which starts nothing")
    flags.add_argument("--module", help="phases that go by module (distill, ...): module 0..N-1, or all (default)")
    flags.add_argument("--expert", help="phase expert: expert 0..E-1 of the module, or all (default)")
    flags.add_argument("--out", help="folder of the run; phases find each other's results there")
    flags.add_argument("--config", metavar="SAVED", help="repeat what made OUT/PHASE/config.yaml, or OUT as a whole")
    flags.add_argument("--dry-run", action="store_true", help="check everything that can be checked, print the cost")
    flags.add_argument("--profile", action="store_true", help=f"where a step's time goes: run.profile={PROFILED_STEPS}")
    flags.add_argument("--print-recipe", action="store_true", help="the resolved recipe, with the origin of each value")
    flags.add_argument("--nodes", help=f"--phase plan: nodes (default {DEFAULTS['nodes']})")
    flags.add_argument("--gpus", help=f"--phase plan: GPUs of a node (default {DEFAULTS['gpus']})")
    gpu_help = f"--phase plan: a GPU of the table, key=value behind it (default {DEFAULTS['gpu']}; h100,share=0.3)"
    flags.add_argument("--gpu", help=gpu_help)
    flags.add_argument("--images", help="--phase plan: training images, where the data is not to be opened")
    flags.add_argument("--classes", help=f"--phase plan: of --images (default {DEFAULTS['classes']})")
    flags.add_argument("--box-images", metavar="N", help="--phase plan: training images of phase detect")
    of_boxes = f"--phase plan: of --box-images (default {DEFAULTS['categories']})"
    flags.add_argument("--categories", metavar="N", help=of_boxes)
    busiest_help = f"--phase plan: rows of the busiest rank over the mean (default {DEFAULTS['busiest']})"
    flags.add_argument("--busiest", help=busiest_help)
    flags.add_argument("--layout", help="import: what SOURCE is, e.g. google_vmoe")
    flags.add_argument("-h", "--help", nargs="?", const="", metavar="SECTION", help="this, or the keys of a section")
    flags.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    flags.add_argument("words", nargs="*", metavar="section.key=value", help=argparse.SUPPRESS)
    return flags


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags; `words` holds overrides, or a command and what it is about.

    Raises:
        ValueError: an unknown flag (the close ones are named), or one without its value.
    """
    flags = parser()
    options, unknown = flags.parse_known_intermixed_args(arguments)  # overrides may stand between the flags
    if unknown:
        known = [flag for action in flags._actions for flag in action.option_strings]
        name, _, _ = unknown[0].partition("=")
        flags.error(f"unknown flag {unknown[0]}. {close(name, known, otherwise='See --help', most=1)}")
    return options


def answer(options: argparse.Namespace) -> str | None:
    """The text of a question that needs no training (help, recipe), or None when there is work to do.

    Raises:
        ValueError: a section that does not exist, or a recipe that cannot be resolved.
    """
    if options.help:
        return manual.section(options.help)
    if options.help is not None:  # without a section
        return parser().format_help()
    if options.print_recipe:
        return _resolved(options)
    return None


def read_plan(options: argparse.Namespace, arguments: Sequence[str]) -> PlanRequest | None:
    """The request behind --phase plan; None where it is something else.

    Raises:
        ValueError: something missing or out of range, or a flag of the plan beside another phase.
    """
    given = vars(options)
    if options.phase != PLAN:
        for flag in PLAN_FLAGS:
            if given[flag] is not None:
                raise ValueError(
                    f"--{flag.replace('_', '-')} has a meaning with --phase {PLAN} alone: ranks are the launcher's"
                )
        return None
    for flag in ("module", "expert", "config", "dry_run", "layout"):
        if given[flag]:
            raise ValueError(f"--{flag.replace('_', '-')} has no meaning for --phase {PLAN}: it plans every phase")
    if not options.recipe:
        raise ValueError("--recipe is missing: --phase plan needs the recipe it plans for")
    recipe_words, ds_words = _overrides(options)
    ds_values = None
    if options.ds_config or ds_words:
        ds_values = read_ds_config(options.ds_config or DS_CONFIG, ds_words)
    values = DEFAULTS | {flag: given[flag] for flag in PLAN_FLAGS if given[flag] is not None}
    return PlanRequest(
        load_recipe(options.recipe, recipe_words),
        ds_values,
        nodes=whole("nodes", values["nodes"]),
        gpus=whole("gpus", values["gpus"]),
        gpu=values["gpu"],
        images=whole("images", values.get("images")),
        classes=whole("classes", values["classes"]),
        box_images=whole("box-images", values.get("box_images")),
        categories=whole("categories", values["categories"]),
        busiest=over_the_mean(values["busiest"]),
        out=Path(options.out) if options.out else None,
        command=shlex.join(["trainer/run.py", *arguments]),
    )


def read_job(options: argparse.Namespace, arguments: Sequence[str]) -> Job:
    """The checked request behind the flags.

    Raises:
        ValueError: something missing, contradictory or unknown.
    """
    words = [word for word in options.words if "=" not in word]
    if words and words[0] not in phase_help():
        near = difflib.get_close_matches(words[0], manual.COMMANDS, n=1)
        if near:
            raise ValueError(f"there is no command {words[0]}. Did you mean {near[0]}?")
    if not options.out:
        raise ValueError("--out is missing: give the folder of the run, e.g. --out runs/demo")
    if options.layout:
        raise ValueError("--layout has no meaning for a phase: it belongs to the command import")
    typed = [argument for argument in arguments if not argument.startswith("--local_rank")]
    command = shlex.join(["trainer/run.py", *typed])
    out = Path(options.out)
    if options.config:
        saved = _saved(options)
        phase = options.phase or saved.phase
        module = saved.module if options.module is None else options.module
        expert = saved.expert if options.expert is None else options.expert
        return Job.checked(saved.recipe, saved.ds_values, phase, module, out, command, expert)
    if not options.recipe:
        raise ValueError(NEEDED)
    recipe_words, ds_words = _overrides(options)
    recipe = load_recipe(options.recipe, recipe_words)
    ds_values = read_ds_config(options.ds_config or DS_CONFIG, ds_words)
    return Job.checked(recipe, ds_values, options.phase or ALL, options.module, out, command, options.expert)


def read_command(options: argparse.Namespace) -> tuple[str, Path, Path | None, dict[str, Any]] | None:
    """(command, path, --out, what import takes besides), or None when the first word is no command.

    The path is the word behind the command, whatever is in it.

    Raises:
        ValueError: no path, no --out where files are written, or words that mean nothing here.
    """
    words = options.words
    flags = vars(options)
    if options.phase in manual.COMMANDS:  # --phase inspect PATH says the same as inspect PATH
        words = [options.phase, *words]
        flags = flags | {"phase": None}
    if not words or words[0] not in manual.COMMANDS:
        return None
    name, *words = words
    usage, _ = manual.COMMANDS[name]
    if not words:
        raise ValueError(f"{name} needs a path: {usage}")
    path, *settings = words
    for flag in ("recipe", "ds_config", "phase", "module", "expert", "config", "dry_run", "profile", "layout", "out"):
        needed = flag in COMMAND_FLAGS[name]
        if needed and not flags[flag]:
            raise ValueError(f"--{flag} is missing: {usage}")
        if flags[flag] and not needed:
            raise ValueError(f"--{flag.replace('dry_run', 'dry-run')} has no meaning for {name}: {usage}")
    import_arguments = {"layout": options.layout} if name == "import" else {}
    for setting in settings:
        key, _, number = setting.partition("=")
        if name != "import" or key not in IMPORT_SETTINGS or not number.isdecimal():
            raise ValueError(f"{setting!r} behind the path means nothing: {usage}")
        import_arguments[key] = int(number)
    out = Path(options.out) if options.out else None
    return name, Path(path), out, import_arguments


def _overrides(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Those of the recipe and those of the DeepSpeed JSON."""
    recipe_words = [text for text in options.words if not text.startswith("ds.")]
    if options.profile:
        recipe_words.insert(0, f"run.profile={PROFILED_STEPS}")  # a number that is typed counts
    ds_words = [text for text in options.words if text.startswith("ds.")]
    return recipe_words, ds_words


def _saved(options: argparse.Namespace) -> Saved:
    if options.words or options.recipe or options.ds_config or options.profile:
        raise ValueError(
            "--config repeats what was saved as it was: leave out --recipe, --ds_config, --profile and overrides"
        )
    return read_saved(Path(options.config))


def _resolved(options: argparse.Namespace) -> str:
    """The recipe, and the DeepSpeed JSON when one is given, with the origin of each value."""
    if options.config:
        saved = _saved(options)
        file = saved.path.name
        recipe_from = dict.fromkeys(all_keys(), file)
        ds_from = ds_origins(saved.ds_values, file, [])
        return manual.resolved(saved.recipe, recipe_from, saved.ds_values, ds_from)
    if not options.recipe:
        raise ValueError("--print-recipe needs --recipe (or --config)")
    recipe_words, ds_words = _overrides(options)
    if ds_words and not options.ds_config:
        raise ValueError(f"{ds_words[0]} changes the DeepSpeed JSON, but --ds_config is missing")
    recipe = load_recipe(options.recipe, recipe_words)
    recipe_from = origins(options.recipe, recipe_words)
    if not options.ds_config:
        return manual.resolved(recipe, recipe_from)
    ds_values = read_ds_config(options.ds_config, ds_words)
    ds_from = ds_origins(ds_values, Path(options.ds_config).name, ds_words)
    return manual.resolved(recipe, recipe_from, ds_values, ds_from)
