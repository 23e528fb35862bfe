"""What every model card words alike: models as links, numbers, tables, how to cite. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

CITATION = """@misc{m2mkd2024,
  title  = {m2mKD: Module-to-Module Knowledge Distillation for Modular Transformers},
  author = {Lo, Ka Man and Liang, Yiming and Du, Wenyu and Fan, Yuantao and Wang, Zili and Huang, Wenhao and Ma, Lei
            and Fu, Jie},
  year   = {2024},
  eprint = {2402.16918},
  archivePrefix = {arXiv},
}"""

CITED = (
    "## How to cite\n\nThe method is m2mKD ([arXiv 2402.16918](https://arxiv.org/abs/2402.16918)):\n\n"
    f"```bibtex\n{CITATION}\n```"
)


def hub_id(source: str) -> tuple[str, str | None] | None:
    """(owner/name, revision) of a source on the hub; None for a directory or nothing."""
    name, _, revision = source.removeprefix("hf-hub:").partition("@")
    elsewhere = name.startswith((".", "/", "~", "local-dir:")) or name.count("/") > 1
    if not name or elsewhere or Path(name).exists():
        return None
    return name, revision or None


def link_to(source: str) -> str:
    """A model as a link with its revision; of a directory only the name."""
    repo = hub_id(source)
    if repo is None:
        return f"a local directory `{Path(source).name}`"
    name, revision = repo
    link = f"[{name}](https://huggingface.co/{name})"
    return f"{link}, revision `{revision}`" if revision else link


def shown(value: float | None, form: str) -> str:
    """A number, or a dash where it is not known."""
    return "-" if value is None else format(value, form)


def table_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown, all but the first column to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
