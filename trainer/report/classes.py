"""Two sections of a run's page, from the analysis of its evaluation: routing over images, and accuracy per class."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from trainer.report.page import figure, percent, table
from trainer.report.svg import matrix, png_uri
from trainer.report.warnings import block

# Okabe and Ito's colours; more experts get evenly spread hues
EXPERTS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7A4FC0")
DROPPED = (0, 0, 0)
MAPS = 12  # MoE blocks drawn, spread evenly over the network
CLASS_ROWS = 40  # up to here every class has its line
HARDEST, EASIEST, CONFUSIONS = 20, 10, 20  # lines above that


def routing_section(analysis: Mapping[str, Any] | None) -> str:
    """Validation images with, per MoE block, the expert that every patch went to."""
    if not analysis or not analysis["layers"] or not analysis["pictures"]:
        return ""
    layers = list(analysis["layers"])
    shown = [layers[place * len(layers) // min(MAPS, len(layers))] for place in range(min(MAPS, len(layers)))]
    colours = expert_colours(max(len(values["load"]) for values in analysis["layers"].values()))
    head = "".join(f"<th>{escape(block(layer))}</th>" for layer in shown)
    rows, photos = [], []
    for place, picture in enumerate(analysis["pictures"]):
        photos.append(f".photo{place}{{background-image:url(data:image/png;base64,{_base64(picture['png'])})}}")
        maps = "".join(
            f'<td><div class="map photo{place}"><img alt="" class="pixels" src="'
            f'{_overlay(picture["experts"][layer], analysis["grid"], colours)}"></div></td>'
            if layer in picture["experts"] else "<td></td>" for layer in shown
        )  # fmt: skip
        right = picture["label"] == picture["predicted"]
        truth, guess = (escape(_short(analysis["labels"][picture[key]])) for key in ("label", "predicted"))
        judged = '<span class="done">right</span>' if right else f'<span class="open">taken for {guess}</span>'
        rows.append(f'<tr><td><div class="map photo{place}"></div>{truth}, {judged}<br>'
                    f'{percent(picture["confidence"])} sure</td>{maps}</tr>')  # fmt: skip
    dropped = any(-1 in layer for picture in analysis["pictures"] for layer in picture["experts"].values())
    legend = [(f"expert {e}", "#{:02x}{:02x}{:02x}".format(*colour)) for e, colour in enumerate(colours)]
    legend += [("dropped: every expert it chose was full", "#000000")] if dropped else []
    items = "".join(f'<li style="--c: {colour}">{name}</li>' for name, colour in legend)
    some = f" {len(shown)} of {len(layers)} MoE blocks are drawn." if len(shown) < len(layers) else ""
    return (
        f"<style>{''.join(photos)}</style><p>Which expert took which patch: {len(rows)} validation images, one column "
        "per MoE block from the input to the output. Each square is a patch, coloured by the expert it went to first; "
        "where a colour follows a shape, that expert has become a specialist for it. The same colour in two blocks "
        f"means different experts.{some}</p>"
        f'<ul class="legend">{items}</ul><div class="scroll"><table class="maps"><thead><tr><th>image</th>{head}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def classes_section(analysis: Mapping[str, Any] | None) -> str:
    """Accuracy per class, what each is mistaken for, and the confusion matrix where the classes are few."""
    if not analysis:
        return ""
    labels, images = [str(label) for label in analysis["labels"]], analysis["classes"]["images"]
    correct = analysis["classes"]["correct"]
    seen = [c for c in range(len(labels)) if images[c]]
    order = sorted(seen, key=lambda c: (correct[c] / images[c], labels[c]))
    groups = {"Every class, the hardest first": order}
    if len(order) > CLASS_ROWS:
        groups = {f"The {HARDEST} hardest classes": order[:HARDEST], f"The {EASIEST} easiest": order[-EASIEST:]}
    text = (
        f"<p>{analysis['images']} validation images of {len(seen)} classes. The bar is the share of a class's images "
        "that were recognised."
    )
    if len(order) > CLASS_ROWS:
        tenth, middle = (correct[c] / images[c] for c in (order[len(order) // 10], order[len(order) // 2]))
        text += f" Half of the classes reach {percent(middle)} or more, a tenth stays below {percent(tenth)}."
    text += "</p>"
    for title, members in groups.items():
        rows = [[escape(labels[c]), _bar(correct[c] / images[c]), f"{images[c]:g}",
                 _mistake(analysis["classes"], c, labels)] for c in members]  # fmt: skip
        text += f"<h3>{title}</h3>" + table(["class", "recognised", "images", "most often taken for"], rows, (1, 3))
    if analysis["confusion"]:
        text += '<div class="scroll">' + figure(
            "Confusion matrix", matrix(analysis["confusion"], labels),
            "A row holds the images of one class, a column what they were taken for. Only the diagonal is right: "
            "every orange square off it is a confusion, and the stronger, the more of the class it takes.",
        ) + "</div>"  # fmt: skip
    elif analysis["confusions"]:
        rows = [[escape(labels[t]), escape(labels[p]), f"{n:g}", percent(n / images[t]) if images[t] else "–"]
                for t, p, n in analysis["confusions"][:CONFUSIONS]]  # fmt: skip
        text += "<h3>The most frequent confusions</h3>"
        text += table(["true class", "taken for", "images", "of the class"], rows, (1,))
    return text


def expert_colours(count: int) -> list[tuple[int, int, int]]:
    """One colour per expert."""
    if count <= len(EXPERTS):
        return [tuple(bytes.fromhex(colour[1:])) for colour in EXPERTS[:count]]
    hues = (colorsys.hsv_to_rgb(e / count, 0.75 if e % 2 else 1.0, 0.95 if e % 2 else 0.75) for e in range(count))
    return [tuple(round(255 * part) for part in hue) for hue in hues]


def _overlay(experts: Sequence[int], grid: Sequence[int], colours: Sequence[tuple[int, int, int]]) -> str:
    """One pixel per patch."""
    picture = Image.new("RGB", (grid[1], grid[0]))
    picture.putdata([colours[e] if 0 <= e < len(colours) else DROPPED for e in experts])
    return png_uri(picture)


def _short(label: Any) -> str:
    return str(label) if len(str(label)) <= 24 else str(label)[:23] + "…"


def _base64(text: str) -> str:
    """Only what base64 is made of: the file may have been edited."""
    return "".join(c for c in text if c.isascii() and (c.isalnum() or c in "+/="))


def _bar(share: float) -> str:
    return f'<span class="bar"><i style="width:{100 * share:.1f}%"></i></span>{percent(share)}'


def _mistake(classes: Mapping[str, Any], number: int, labels: Sequence[str]) -> str:
    other, count = classes["taken_for"][number], classes["taken_count"][number]
    return f"{escape(labels[other])} ({count} time{'s' * (count != 1)})" if other >= 0 else "–"
