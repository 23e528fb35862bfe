"""What a model card has to be typed: how to install the code, load the model, predict, train it further, export it.

Every block is run as it stands by tests/package, against a stand-in of the hub, without a clone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.hub.address import install_command

TRAIN = """{imports}targets = torch.zeros(len(images), dtype=torch.long)  # the class of each picture, by its number
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
model.train()
for batch in torch.arange(len(images)).split(7)[:3]:  # batches of any size
{loss}
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
{save}
"""
# of a model whose forward takes `out`
OUR_IMPORTS = """from m2mkd.moe import auxiliary_loss
from torch.nn.functional import cross_entropy

"""
OUR_LOSS = """    out = {}
    loss = cross_entropy(model(images[batch], out), targets[batch]) + auxiliary_loss(out)"""
THEIR_LOSS = "    loss = model(images[batch], labels=targets[batch]).loss"
PICTURES = """pictures = [Image.open(path).convert("RGB") for path in sorted(Path("images").rglob("*.png"))]"""


@dataclass(frozen=True)
class StudentClass:
    """Where a kind of student is found.

    Attributes:
        title: for people.
        remote: the module that hub.code pushes (trainer/hub/code.py), by transformers' way to name them.
        sparse: whether its tokens are sent to experts.
        faster: how to use less of it than was trained; {load} is the arguments that it is loaded with.
    """

    name: str
    module: str
    title: str
    remote: str
    sparse: bool
    faster: str


# "model_type" in config.json -> class
MODELS = {
    "vmoe": StudentClass(
        "VMoE",
        "m2mkd.vmoe",
        "V-MoE",
        "modeling_vmoe",
        sparse=True,
        faster="`VMoE.from_pretrained({load}, k=1)` sends every token to one expert instead.",
    ),
    "nac": StudentClass(
        "NAC",
        "m2mkd.nac",
        "NAC",
        "modeling_nac",
        sparse=False,
        faster="`NAC.from_pretrained({load}).pruned(n)` keeps its n best connected mediators: faster, less exact.",
    ),
}


@dataclass(frozen=True)
class Published:
    """What the snippets depend on.

    Attributes:
        model: the class, of MODELS.
        revision: branch, "" = main.
        address, commit: of the code; None = not known.
        code: whether the modelling file was pushed as well.
        images_together: images that compete for the places of an expert in evaluation; 1 = none do.
    """

    model: StudentClass
    repo: str
    revision: str
    address: str | None
    commit: str | None
    code: bool
    classifies: bool
    labels: bool
    images_together: int


def usage(published: Published) -> str:
    """The section of the card, without its head."""
    routes = {
        "torch": _torch(published),
        "timm": _timm(published),
        "transformers": _transformers(published, remote=False),
    }
    if published.code:
        routes["transformers, without m2mkd"] = _transformers(published, remote=True)
    parts = [_install(published)]
    parts += [f"### With {name}\n\n{text}" for name, text in routes.items()]
    parts.append(f"### On the command line\n\n{_command_line(published)}")
    return "\n\n".join(parts)


def _install(published: Published) -> str:
    needs = "It needs torch, timm, safetensors and huggingface_hub; no DeepSpeed."
    if published.address is None:
        return (
            "The code is the Python package m2mkd; its address was not given when this model was pushed "
            "(`hub.code_url`). In a clone of the project `make wheel` builds it, and `pip install dist/m2mkd-*.whl` "
            f"installs it. {needs}"
        )
    command = install_command(published.address, published.commit)
    return f"```bash\n{command}\n```\n\nThis installs the code of the model, the package m2mkd. {needs}"


def _torch(published: Published) -> str:
    branch = f', revision="{published.revision}"' if published.revision else ""
    name = published.model.name
    source = f'"{published.repo}"{branch}'
    load = f"model = {name}.from_pretrained({source})  # in evaluation mode"
    first = f"""import torch
from m2mkd.predict import find_pictures, to_batch
from {published.model.module} import {name}

{load}
images = to_batch(find_pictures(["images"]), model.preprocessing)  # a folder; (B, C, H, W)
"""
    if not published.classifies:
        first += """with torch.no_grad():
    features = model(images)  # (B, D)
    tokens = model.forward_features(images)  # (B, T, D)
    as_teacher = model(images, as_teacher=True)  # tokens in the width of the teacher
"""
        return _python(first)
    first += """with torch.no_grad():
    logits = model(images)
"""
    first += _told(published, "model.labels[index]")
    save = f"""model.save_pretrained("tuned")
model = {name}.from_pretrained("tuned")"""
    further = TRAIN.format(imports=OUR_IMPORTS, loss=OUR_LOSS, save=save)
    faster = published.model.faster.format(load=source)
    return f"{_python(first)}\n\nTo train it further:\n\n{_python(further)}\n\n{faster}"


def _timm(published: Published) -> str:
    source = f"{published.repo}@{published.revision}" if published.revision else published.repo
    first = f"""import m2mkd.registry  # {published.model.title} among timm's models
import timm
import torch
from pathlib import Path
from PIL import Image

model = timm.create_model("hf-hub:{source}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
{PICTURES}
images = torch.stack([transform(picture) for picture in pictures])
"""
    if not published.classifies:
        return _python(first + "with torch.no_grad():\n    tokens = model.forward_features(images)  # (B, T, D)\n")
    first += "with torch.no_grad():\n    logits = model(images)\n"
    first += _told(published, "model.labels[index]")
    save = """model.save_pretrained("tuned_timm")
model = timm.create_model("local-dir:tuned_timm", pretrained=True)"""
    further = TRAIN.format(imports=OUR_IMPORTS, loss=OUR_LOSS, save=save)
    return f"{_python(first)}\n\nTo train it further:\n\n{_python(further)}"


def _transformers(published: Published, *, remote: bool) -> str:
    options = ""
    if published.revision:
        options += f', revision="{published.revision}"'
    trust = ", trust_remote_code=True" if remote else ""
    auto = "AutoModelForImageClassification" if published.classifies else "AutoModel"
    register = "" if remote else f"import m2mkd.auto  # {published.model.title} among transformers' models\n"
    first = f"""{register}import torch
from pathlib import Path
from PIL import Image
from transformers import AutoImageProcessor, {auto}

model = {auto}.from_pretrained("{published.repo}"{options}{trust})
processor = AutoImageProcessor.from_pretrained("{published.repo}"{options})
{PICTURES}
images = processor(pictures, return_tensors="pt").pixel_values
"""
    about = "transformers comes beside it: `pip install transformers`.\n\n"
    if remote:
        about = (
            f"`{published.model.remote}.py` is the model in one file; it needs torch, transformers and timm "
            "(`pip install torch transformers timm`). `trust_remote_code=True` runs it: read it first, and pin a "
            "`revision`.\n\n"
        )
    if not published.classifies:
        first += "with torch.no_grad():\n    features = model(images).pooler_output  # (B, D)\n"
        return about + _python(first)
    first += "with torch.no_grad():\n    logits = model(images).logits\n"
    first += _told(published, "model.config.id2label[index]")
    folder = "tuned_alone" if remote else "tuned_transformers"
    save = f"""model.save_pretrained("{folder}")
model = {auto}.from_pretrained("{folder}"{trust})"""
    further = TRAIN.format(imports="", loss=THEIR_LOSS, save=save)
    return f"{about}{_python(first)}\n\nTo train it further:\n\n{_python(further)}"


def _command_line(published: Published) -> str:
    source = f"{published.repo}@{published.revision}" if published.revision else published.repo
    lines = [f"m2mkd info {source}"]
    if published.classifies:
        lines.append(f"m2mkd predict images --model {source} --top 3")
    export = f"m2mkd export {source} --out model.pt2"
    takes = "takes any number of images and gives the same logits"
    if published.images_together > 1:
        export += f" --batch {published.images_together}"
        takes = "takes batches of that size: so many images compete for the places of an expert"
    lines.append(export)
    commands = "\n".join(lines)
    return (
        f"```bash\n{commands}\n```\n\n`--out model.onnx` writes ONNX (`pip install onnx onnxscript onnxruntime`). What "
        f"is exported {takes}."
    )


def _told(published: Published, name: str) -> str:
    """A line that prints what the pictures were taken for."""
    indices = "logits.argmax(-1).tolist()"
    if not published.labels:
        return f"print({indices})\n"
    return f"print([{name} for index in {indices}])\n"


def _python(code: str) -> str:
    return f"```python\n{code.rstrip()}\n```"


def published_as(hub: Any, address: str | None, commit: str | None, config: Mapping[str, Any]) -> Published:
    """What a recipe's section hub and a student's config.json say of it."""
    model = MODELS[config["model_type"]]
    together = 1
    if model.sparse and config["moe"]["eval_capacity_factor"] is not None:
        together = config["moe"]["images_per_group"]
    return Published(
        model=model,
        repo=hub.repo,
        revision="" if hub.revision == "main" else hub.revision,
        address=address,
        commit=commit,
        code=hub.code,
        classifies=bool(config["num_classes"]),
        labels=bool(config.get("labels")),
        images_together=together,
    )
