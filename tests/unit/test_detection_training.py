"""A detector learns: its loss falls, because of what is on each picture."""

import torch

from models.detection import Detector, DetectorConfig
from models.detection.backbone import Made
from models.preprocessing import Preprocessing
from models.vmoe import VMoE, VMoEConfig
from trainer.config.detect import BoxDataConfig, DetectConfig
from trainer.data.boxes.batches import BoxData
from trainer.data.boxes.sources import open_boxes
from trainer.objectives.detect import Detect

PICTURES = 4
STEPS = 60


def test_the_loss_falls_by_what_is_on_each_picture():
    """Part of it is what boxes there are anywhere: so each picture is tried with another's objects too."""
    drawn = BoxDataConfig(size=32, shapes=2, objects=2, train_pictures=PICTURES)
    train, val = open_boxes(DetectConfig(data=drawn), max_pixels=10_000)
    heads = {"width": 32, "queries": 4, "groups": 2, "layers": 1, "heads": 2, "mlp_dim": 32, "maps": 2}
    pre = Preprocessing(32, (0.5,) * 3, (0.25,) * 3)
    config = DetectorConfig(
        tuple(train.categories), tuple(train.category_ids), pre, shorter_side=32, longest_side=32, **heads
    )
    moe = {"num_experts": 2, "k": 1, "images_per_group": 1, "importance_weight": 0.01}
    sizes = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 2, "mlp_dim": 64, "num_classes": 0}
    vit = VMoE(VMoEConfig(**sizes, moe_blocks="1", moe=moe))
    objective = Detect(Detector(config, vit, Made("vmoe", {})), patches=16)
    data = BoxData(train, val, config, hflip=0.0, jitter=(1.0, 1.0), workers=0)
    batch = next(
        data.train_batches(
            seed=0,
            epoch=0,
            start_step=0,
            epochs=1,
            micro_batch=PICTURES,
            accumulation=1,
            world=1,
            rank=0,
            workers=0,
            device="cpu",
        )
    )
    images, objects = batch.images.to("cpu", torch.float32), batch.labels.to("cpu")
    of_others = objects[1:] + objects[:1]
    module = objective.module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3, weight_decay=0.0)

    def loss(targets):
        return objective(module, images, targets)[0]

    with torch.no_grad():
        before, before_of_others = float(loss(objects)), float(loss(of_others))
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(objects).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        after, after_of_others = float(loss(objects)), float(loss(of_others))
    assert after < 0.7 * before
    assert before > 0.9 * before_of_others and after < 0.9 * after_of_others
