"""Our students among transformers' Auto classes: after `import models.auto` they read what save_pretrained wrote.

    import models.auto
    model = AutoModelForImageClassification.from_pretrained("owner/name")
    model = AutoModel.from_pretrained("owner/name")  # features, with or without classes
    processor = AutoImageProcessor.from_pretrained("owner/name")

Same config.json, same weights file, no code from the hub. B images, T tokens, D width, C classes.
"""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ViTImageProcessor,
    ViTImageProcessorPil,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils import can_return_tuple

from .moe.out import auxiliary_loss
from .nac.config import NACConfig
from .nac.model import NAC, reset_linear
from .preprocessing import Preprocessing
from .teacher.images import to_processor
from .version import check_needs
from .vmoe.model import VMoE, VMoEConfig, reset_head

# what transformers finds in the modelling file that lies beside weights (trainer/hub/code.py), by the model_type of the
# student: Auto class -> class here
REMOTE = {
    "vmoe": {
        "AutoConfig": "VMoETransformersConfig",
        "AutoModel": "VMoEModel",
        "AutoModelForImageClassification": "VMoEForImageClassification",
    },
    "nac": {
        "AutoConfig": "NACTransformersConfig",
        "AutoModel": "NACModel",
        "AutoModelForImageClassification": "NACForImageClassification",
    },
}


class StudentTransformersConfig(PreTrainedConfig):
    """config.json as transformers sees it: `labels` become id2label, the other keys attributes."""

    student_config: ClassVar[type]  # a VMoEConfig or NACConfig

    def __post_init__(self, **content: Any) -> None:
        check_needs(content, "this model")
        labels = content.get("labels")
        if self.id2label is None and labels and content.get("num_labels", len(labels)) == len(labels):
            self.id2label = dict(enumerate(labels))
            self.label2id = {label: i for i, label in enumerate(labels)}
        if content.get("num_classes") is not None:
            content.setdefault("num_labels", content["num_classes"])
        super().__post_init__(**content)

    def student(self) -> Any:
        """The configuration of the model, with the number of classes asked for here."""
        known = self.student_config.__dataclass_fields__
        values = {name: getattr(self, name) for name in known if hasattr(self, name)}
        if self.num_labels and "feature_width" in known:
            values["feature_width"] = 0
        return self.student_config.from_dict(values | {"num_classes": self.num_labels})


class StudentPreTrainedModel(PreTrainedModel):
    """A student behind transformers' interface: what all kinds share."""

    student_class: ClassVar[type]
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: StudentTransformersConfig) -> None:
        super().__init__(config)
        # weights on disk carry no prefix
        setattr(self, self.base_model_prefix, self.student_class(config.student()))
        self.post_init()

    @property
    def student(self) -> nn.Module:
        """Our model."""
        return getattr(self, self.base_model_prefix)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *arguments: Any, output_loading_info: bool = False, **options: Any
    ) -> Any:
        """As transformers', but a tensor that is missing or left over is an error.

        Raises:
            ValueError: naming it.
        """
        model, info = super().from_pretrained(name, *arguments, output_loading_info=True, **options)
        missing = set(info["missing_keys"])
        unexpected = set(info["unexpected_keys"])
        if getattr(model.config, "num_classes", None) == 0:  # features were saved, and a new head was asked for
            missing -= {f"{cls.base_model_prefix}.head.{kind}" for kind in ("weight", "bias")}
            unexpected -= {f"feature_head.{kind}" for kind in ("weight", "bias")}
        wrong = sorted(missing) or sorted(unexpected)
        if wrong:
            raise ValueError(f"the weights of {name} do not fit its config.json: {wrong[:3]} are missing or left over.")
        model.student.preprocessing = _preprocessing(model.config.to_dict())
        labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
        invented = [f"LABEL_{i}" for i in range(len(labels))]  # what transformers calls classes without names
        model.student.labels = None if labels == invented else labels
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: str | Path,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: int | str = "5GB",
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **_: Any,
    ) -> None:
        """Write what the student's save_pretrained writes, so that all three routes read it again.

        Raises:
            ValueError: push_to_hub, which is a call of its own.
        """
        if push_to_hub:
            raise ValueError("save_pretrained does not push: call model.push_to_hub(repo_id) as well.")
        if is_main_process:
            state = state_dict
            if state:
                prefix = f"{self.base_model_prefix}."
                state = {name.removeprefix(prefix): value for name, value in state.items()}
            self.student.save_pretrained(save_directory, state=state, max_shard_size=max_shard_size)
            if self.is_remote_code():
                _save_code(Path(save_directory), type(self).__module__)


class StudentForImageClassification(StudentPreTrainedModel):
    """A student with classes; the loss includes what the student adds to it: balance losses, regularisers."""

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> ImageClassifierOutput:
        """Images (B, channels, H, W) and class indices (B,) -> logits (B, C) and, with labels, the loss."""
        out = {}
        logits = self.student(pixel_values, out)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config) + auxiliary_loss(out)
        return ImageClassifierOutput(loss=loss, logits=logits)


class StudentModel(StudentPreTrainedModel):
    """The features of a student."""

    @can_return_tuple
    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Images (B, channels, H, W) -> normalised tokens (B, T, D), and pooled what a head reads (B, D)."""
        tokens = self.student.forward_features(pixel_values)
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens, pooler_output=self.student.forward_head(tokens, pre_logits=True)
        )


def _save_code(directory: Path, module: str) -> None:
    """Put the modelling file that a model was loaded by beside its weights, where transformers finds it again.

    Args:
        module: by its name among those that transformers has imported.
    """
    source = Path(sys.modules[module].__file__)
    if source.resolve() != (directory / source.name).resolve():
        shutil.copyfile(source, directory / source.name)
    path = directory / "config.json"
    content = json.loads(path.read_text())
    content["auto_map"] = {auto: f"{source.stem}.{name}" for auto, name in REMOTE[content["model_type"]].items()}
    path.write_text(json.dumps(content, indent=2) + "\n")


class VMoETransformersConfig(StudentTransformersConfig):
    """A V-MoE's."""

    model_type = VMoE.FORMAT.model_type
    student_config = VMoEConfig
    attribute_map = {  # noqa: RUF012  transformers' words
        "hidden_size": "width",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
        "intermediate_size": "mlp_dim",
        "num_channels": "in_chans",
    }


class VMoEPreTrainedModel(StudentPreTrainedModel):
    """What both kinds of a V-MoE share."""

    config_class = VMoETransformersConfig
    base_model_prefix = "vmoe"
    student_class = VMoE
    _no_split_modules = ["VMoEBlock"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        # VMoE starts itself; only a head for other classes than the saved ones is made by transformers
        if module is self.vmoe.head and isinstance(module, nn.Linear):
            reset_head(module)
        # and transformers empties the buffers that no file has
        if module is self.vmoe.rope and module is not None:
            module.init_non_persistent_buffers()


class VMoEForImageClassification(VMoEPreTrainedModel, StudentForImageClassification):
    """A V-MoE with classes."""

    def __init__(self, config: VMoETransformersConfig) -> None:
        if not config.num_labels:
            raise ValueError("this V-MoE has no classes: take AutoModel for its features, or give num_labels=...")
        super().__init__(config)


class VMoEModel(VMoEPreTrainedModel, StudentModel):
    """The features of a V-MoE, with or without classes."""


class NACTransformersConfig(StudentTransformersConfig):
    """A NAC's."""

    model_type = NAC.FORMAT.model_type
    student_config = NACConfig
    attribute_map = {  # noqa: RUF012  transformers' words
        "hidden_size": "state_dim",
        "num_hidden_layers": "propagators",
        "num_attention_heads": "heads",
        "num_channels": "in_chans",
    }


class NACPreTrainedModel(StudentPreTrainedModel):
    """What both kinds of a NAC share."""

    config_class = NACTransformersConfig
    base_model_prefix = "nac"
    student_class = NAC
    _no_split_modules = ["Exchange"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        # as of a V-MoE
        if module is self.nac.head:
            reset_linear(module, self.nac.config.seed, "head")


class NACForImageClassification(NACPreTrainedModel, StudentForImageClassification):
    """A NAC with classes."""


class NACModel(NACPreTrainedModel, StudentModel):
    """The states of a NAC's output latents (B, N, D), and pooled what its head reads."""


class _FromModelConfig:
    """Image settings from the `preprocessing` in config.json, unless the processor was saved on its own."""

    @classmethod
    def get_image_processor_dict(cls, name: str | Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        in_config = options | {"image_processor_filename": "config.json"}
        content, rest = super().get_image_processor_dict(name, **in_config)
        preprocessing = _preprocessing(content)
        if preprocessing is None:
            return super().get_image_processor_dict(name, **options)
        return to_processor(preprocessing).to_dict(), rest


class StudentImageProcessor(_FromModelConfig, ViTImageProcessor):
    """ViTImageProcessor on torchvision."""


class StudentImageProcessorPil(_FromModelConfig, ViTImageProcessorPil):
    """ViTImageProcessor on PIL."""


def _preprocessing(content: Mapping[str, Any]) -> Preprocessing | None:
    values = content.get("preprocessing")
    return None if values is None else Preprocessing.from_dict(values)


for _config, _model, _classifier in (
    (VMoETransformersConfig, VMoEModel, VMoEForImageClassification),
    (NACTransformersConfig, NACModel, NACForImageClassification),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForImageClassification.register(_config, _classifier)
    AutoImageProcessor.register(
        _config,
        image_processor_classes={"torchvision": StudentImageProcessor, "pil": StudentImageProcessorPil},
    )
