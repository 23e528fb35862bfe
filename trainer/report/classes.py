"""Two sections of a run's page, from the analysis of its evaluation: routing over images, and accuracy per class."""

from __future__ import annotations

import base64
import colorsys
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from trainer.report.charts import Matrix
from trainer.report.page import figure, percent, table
from trainer.report.warnings import block

# Okabe and Ito's colours; more experts get evenly spread hues
EXPERTS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7A4FC0")
DROPPED = (0, 0, 0)
RGB = tuple[int, int, int]
MAPS = 12  # MoE blocks drawn, spread evenly over the network
MAP_ROWS = 6  # images of the picture for a model card
MAP_SIDE, MAP_GAP = 96, 4  # pixels of an image there, and between two
MAP_OPACITY = 0.6  # of the colours over the image
CLASS_ROWS = 40  # up to here every class has its line
HARDEST, EASIEST, CONFUSIONS = 20, 10, 20  # lines above that


def routing_section(analysis: Mapping[str, Any] | None) -> str:
    """Validation images with, per MoE block, the expert that every patch went to."""
    if not analysis or not analysis["layers"] or not analysis["pictures"]:
        return ""
    layers = list(analysis["layers"])
    shown = _shown(analysis)
    count = len(shown)
    most_experts = max(len(values["load"]) for values in analysis["layers"].values())
    colours = expert_colours(most_experts)
    photos = ""
    rows = ""
    for place, picture in enumerate(analysis["pictures"]):
        photos += f".photo{place}{{background-image:url(data:image/png;base64,{_base64(picture['png'])})}}"
        rows += _picture_row(place, picture, analysis, shown, colours)
    head = "".join(f"<th>{escape(block(layer))}</th>" for layer in shown)
    some = ""
    if count < len(layers):
        some = f" {count} of {len(layers)} MoE blocks are drawn."
    return (
        f"<style>{photos}</style><p>Which expert took which patch: {len(analysis['pictures'])} validation images, one "
        "column per MoE block from the input to the output. Each square is a patch, coloured by the expert it went to "
        "first; where a colour follows a shape, that expert has become a specialist for it. The same colour in two "
        f"blocks means different experts.{some}</p>"
        f'<ul class="legend">{_expert_legend(analysis["pictures"], colours)}</ul>'
        f'<div class="scroll"><table class="maps"><thead><tr><th>image</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def expert_maps(analysis: Mapping[str, Any] | None) -> bytes | None:
    """The same as one PNG for a model card: images below each other, maps beside them; None where there are none."""
    if not analysis or not analysis["layers"] or not analysis["pictures"]:
        return None
    layers = _shown(analysis)
    colours = expert_colours(max(len(values["load"]) for values in analysis["layers"].values()))
    pictures = analysis["pictures"][:MAP_ROWS]
    step = MAP_SIDE + MAP_GAP
    sheet = Image.new("RGB", (step * (1 + len(layers)) - MAP_GAP, step * len(pictures) - MAP_GAP), "white")
    for row, picture in enumerate(pictures):
        photo = Image.open(io.BytesIO(base64.b64decode(_base64(picture["png"])))).convert("RGB")
        photo = photo.resize((MAP_SIDE, MAP_SIDE), Image.Resampling.NEAREST)
        sheet.paste(photo, (0, row * step))
        for column, layer in enumerate(layers, start=1):
            if layer not in picture["experts"]:
                continue
            patches = _patches(picture["experts"][layer], analysis["grid"], colours)
            overlay = patches.resize((MAP_SIDE, MAP_SIDE), Image.Resampling.NEAREST)
            sheet.paste(Image.blend(photo, overlay, MAP_OPACITY), (column * step, row * step))
    with io.BytesIO() as file:
        sheet.save(file, "PNG", optimize=True)
        return file.getvalue()


def _shown(analysis: Mapping[str, Any]) -> list[str]:
    """The MoE blocks that are drawn, spread evenly over the network."""
    layers = list(analysis["layers"])
    count = min(MAPS, len(layers))
    return [layers[place * len(layers) // count] for place in range(count)]


def _picture_row(
    place: int, picture: Mapping[str, Any], analysis: Mapping[str, Any], layers: Sequence[str], colours: Sequence[RGB]
) -> str:
    """One image: what it is and was taken for, and its map of experts in each of the layers."""
    said = ""
    if "label" in picture:
        said = _what_it_was_taken_for(picture, analysis["labels"])
    maps = ""
    for layer in layers:
        drawn = ""
        if layer in picture["experts"]:
            overlay = _overlay(picture["experts"][layer], analysis["grid"], colours)
            drawn = f'<div class="map photo{place}"><img alt="" class="pixels" src="{overlay}"></div>'
        maps += f"<td>{drawn}</td>"
    return f'<tr><td><div class="map photo{place}"></div>{said}</td>{maps}</tr>'


def _what_it_was_taken_for(picture: Mapping[str, Any], labels: Sequence[Any]) -> str:
    """An image's class, and what the student says it is."""
    truth = escape(_short(labels[picture["label"]]))
    guess = escape(_short(labels[picture["predicted"]]))
    verdict = f'<span class="open">taken for {guess}</span>'
    if picture["label"] == picture["predicted"]:
        verdict = '<span class="done">right</span>'
    return f"{truth}, {verdict}<br>{percent(picture['confidence'])} sure"


def _expert_legend(pictures: Sequence[Mapping[str, Any]], colours: Sequence[RGB]) -> str:
    entries = [(f"expert {expert}", colour) for expert, colour in enumerate(colours)]
    if any(-1 in experts for picture in pictures for experts in picture["experts"].values()):
        entries.append(("dropped: every expert it chose was full", DROPPED))
    return "".join('<li style="--c: #{:02x}{:02x}{:02x}">{}</li>'.format(*colour, name) for name, colour in entries)


def classes_section(analysis: Mapping[str, Any] | None) -> str:
    """Accuracy per class, what each is mistaken for, and the confusion matrix where the classes are few."""
    if not analysis or "classes" not in analysis:
        return ""
    labels = [str(label) for label in analysis["labels"]]
    images = analysis["classes"]["images"]
    correct = analysis["classes"]["correct"]
    # share of a class's images that were recognised, of the classes that have images
    recalls = {c: correct[c] / images[c] for c in range(len(labels)) if images[c]}
    order = sorted(recalls, key=lambda c: (recalls[c], labels[c]))
    text = (
        f"<p>{analysis['images']} validation images of {len(order)} classes. The bar is the share of a class's images "
        "that were recognised."
    )
    groups = {"Every class, the hardest first": order}
    if len(order) > CLASS_ROWS:
        groups = {f"The {HARDEST} hardest classes": order[:HARDEST], f"The {EASIEST} easiest": order[-EASIEST:]}
        tenth = recalls[order[len(order) // 10]]
        middle = recalls[order[len(order) // 2]]
        text += f" Half of the classes reach {percent(middle)} or more, a tenth stays below {percent(tenth)}."
    text += "</p>"
    for title, members in groups.items():
        rows = []
        for c in members:
            mistake = _mistake(analysis["classes"], c, labels)
            rows.append([escape(labels[c]), _bar(recalls[c]), f"{images[c]:g}", mistake])
        text += f"<h3>{title}</h3>" + table(["class", "recognised", "images", "most often taken for"], rows, (1, 3))
    return text + _confusions(analysis, labels)


def _confusions(analysis: Mapping[str, Any], labels: Sequence[str]) -> str:
    """The confusion matrix; the most frequent confusions where the classes are too many for one, or it is not drawn."""
    if analysis["confusion"]:
        caption = (
            "A row holds the images of one class, a column what they were taken for. Only the diagonal is right: "
            "every orange square off it is a confusion, and the stronger, the more of the class it takes."
        )
        drawn = figure(Matrix("Confusion matrix", analysis["confusion"], labels), caption)
        if drawn:
            return f'<div class="scroll">{drawn}</div>'
    if not analysis["confusions"]:
        return ""
    rows = []
    for truth, predicted, count in analysis["confusions"][:CONFUSIONS]:
        images = analysis["classes"]["images"][truth]
        share = percent(count / images) if images else "–"
        rows.append([escape(labels[truth]), escape(labels[predicted]), f"{count:g}", share])
    head = ["true class", "taken for", "images", "of the class"]
    return "<h3>The most frequent confusions</h3>" + table(head, rows, (1,))


def expert_colours(count: int) -> list[RGB]:
    """One colour per expert."""
    if count <= len(EXPERTS):
        return [tuple(bytes.fromhex(colour[1:])) for colour in EXPERTS[:count]]
    colours = []
    for expert in range(count):
        # hues evenly around the circle; neighbours differ in strength as well
        saturation, brightness = (0.75, 0.95) if expert % 2 else (1.0, 0.75)
        parts = colorsys.hsv_to_rgb(expert / count, saturation, brightness)
        colours.append(tuple(round(255 * part) for part in parts))
    return colours


def _overlay(experts: Sequence[int], grid: Sequence[int], colours: Sequence[RGB]) -> str:
    """A PNG as a data URI with one pixel per patch."""
    with io.BytesIO() as file:
        _patches(experts, grid, colours).save(file, "PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _patches(experts: Sequence[int], grid: Sequence[int], colours: Sequence[RGB]) -> Image.Image:
    """One pixel per patch, in the colour of its expert."""
    rows, columns = grid
    picture = Image.new("RGB", (columns, rows))
    colour_of = dict(enumerate(colours))  # -1 is a dropped patch
    picture.putdata([colour_of.get(expert, DROPPED) for expert in experts])
    return picture


def _short(label: Any) -> str:
    text = str(label)
    return text if len(text) <= 24 else text[:23] + "…"


def _base64(text: str) -> str:
    """Only what base64 is made of: the file may have been edited."""
    return "".join(c for c in text if c.isascii() and (c.isalnum() or c in "+/="))


def _bar(share: float) -> str:
    return f'<span class="bar"><i style="width:{100 * share:.1f}%"></i></span>{percent(share)}'


def _mistake(classes: Mapping[str, Any], number: int, labels: Sequence[str]) -> str:
    other = classes["taken_for"][number]
    count = classes["taken_count"][number]
    if other < 0:
        return "–"
    times = "time" if count == 1 else "times"
    return f"{escape(labels[other])} ({count} {times})"
