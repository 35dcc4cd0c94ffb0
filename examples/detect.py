"""Detect what is in a picture with a detector of torchvision or transformers as a package, and draw it.

    python examples/detect.py PICTURE [--model fasterrcnn_resnet50_fpn] [--weights DEFAULT | none | FILE]
        [--package out/fasterrcnn_resnet50_fpn.pt2] [--out out/detections.png] [--score 0.5] [--most 20]

The model is a detector of torchvision (maskrcnn_resnet50_fpn), a detector or segmenter on the Hugging Face hub
(PekingU/rtdetr_v2_r18vd) or, with ``--weights none``, a kind of transformers' models (deformable_detr, mask2former).
Where there is no package yet it is made, for pictures of any size, which takes minutes and needs the model's library;
trained weights are downloaded. With a package, torch and Pillow are all that is needed. Prints what was detected and
how long that took; ``--weights none`` shows with random weights, without a download, that it runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import pathlib
import statistics
import sys
import time
import warnings
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

# torch speaks of its own internals.
warnings.filterwarnings("ignore", message=".*(LeafSpec|is deprecated)")

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")


def make_package(model: str, weights: str, picture: Image.Image, path: pathlib.Path) -> None:
    """Write the package, and beside it, for a model of transformers, how pictures are prepared for it."""
    from inductor_vision import accelerate, export_detector

    accelerate()  # before torchvision is imported, which may not load by itself
    torch.manual_seed(0)
    from_torchvision = torchvision_detector(model, weights)
    preparation: dict[str, Any] = {}
    detector, labels = from_torchvision or transformers_detector(model, weights, preparation)
    print(f"making {path}: a few minutes", flush=True)
    start = time.perf_counter()
    one_size = "height" in preparation.get("size", {})  # that all pictures are resized to
    export_detector(detector.eval(), prepare(picture, preparation), path, labels=labels, any_size=not one_size)
    if preparation:
        preparation_of(path).write_text(json.dumps(preparation))
    else:
        preparation_of(path).unlink(missing_ok=True)  # of an earlier package
    print(f"made it in {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1e6:.0f} MB")


def preparation_of(path: pathlib.Path) -> pathlib.Path:
    """Where it is written how pictures are prepared for a package of a model of transformers."""
    return path.with_name(f"{path.name}.json")


def torchvision_detector(model: str, weights: str) -> tuple[Any, list[str]] | None:
    """A detector and the names of its classes, if torchvision has one of this name."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    from torchvision import models

    if model not in models.list_models(models.detection):
        return None
    trained = models.get_model_weights(model).DEFAULT
    if weights == "DEFAULT":
        try:
            detector = models.get_model(model, weights=trained)
        except OSError as error:
            sys.exit(f"cannot download the trained weights ({error}); --weights takes a file with them, or none")
    else:
        detector = models.get_model(model, weights=None, weights_backbone=None)
        if weights != "none":
            detector.load_state_dict(torch.load(weights, weights_only=True))
    return detector, [name.replace(",", "") for name in trained.meta["categories"]]


def transformers_detector(model: str, weights: str, preparation: dict[str, Any]) -> tuple[Any, list[str]]:
    """A model of transformers and the names of its classes; ``preparation`` says how pictures are prepared for it."""
    try:
        import transformers

        if weights == "none":
            config = transformers.AutoConfig.for_model(model)
            preparation.update(size={"height": 640, "width": 640}, mean=[0.0] * 3, std=[1.0] * 3)
        else:
            config = transformers.AutoConfig.from_pretrained(model)
            processor = transformers.AutoImageProcessor.from_pretrained(model)
            normalized = processor.do_normalize
            mean, std = (processor.image_mean, processor.image_std) if normalized else ([0.0] * 3, [1.0] * 3)
            preparation.update(size=dict(processor.size), mean=list(mean), std=list(std))
        detects = type(config) in transformers.AutoModelForObjectDetection._model_mapping
        kind = transformers.AutoModelForObjectDetection if detects else transformers.AutoModelForUniversalSegmentation
        detector = kind.from_config(config) if weights == "none" else kind.from_pretrained(model)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"neither torchvision nor transformers has {model}, or it cannot be downloaded: {error}")
    return detector, [config.id2label[label].replace(",", "") for label in sorted(config.id2label)]


def prepare(picture: Image.Image, preparation: dict[str, Any]) -> Tensor:
    """What a package takes: the picture as it is, or resized and normalized as ``preparation`` says."""
    if preparation:
        size = preparation["size"]
        if "shortest_edge" in size:
            scale = size["shortest_edge"] / min(picture.size)
            scale = min(scale, size.get("longest_edge", math.inf) / max(picture.size))
            width, height = (round(scale * side) for side in picture.size)
        else:
            width, height = size["width"], size["height"]
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous() / 255
    if preparation:
        mean, std = (torch.tensor(preparation[name])[:, None, None] for name in ("mean", "std"))
        image = (image - mean) / std
    return image


def for_picture(detections: dict[str, Tensor], image: Tensor, picture: Image.Image) -> dict[str, Tensor]:
    """Detections in pixels of the picture instead of the image that was made of it."""
    height, width = image.shape[1:]
    scale = torch.tensor([picture.width / width, picture.height / height])
    found = {**detections, "boxes": detections["boxes"] * scale.repeat(2)}
    if "masks" in found and len(found["masks"]):
        found["masks"] = torch.nn.functional.interpolate(found["masks"], size=picture.size[::-1])
    return found


def detect(package: Any, image: Tensor, runs: int = 3) -> tuple[dict[str, Tensor], float]:
    """Detections, and the median time in milliseconds."""
    detections, times = package(image), []
    for _ in range(runs):
        start = time.perf_counter()
        detections = package(image)
        times.append(1e3 * (time.perf_counter() - start))
    return detections, statistics.median(times)


def draw(picture: Image.Image, detections: dict[str, Tensor], names: list[str]) -> Image.Image:
    """Boxes with their names; masks, and keypoints, where there are some."""
    pixels = np.asarray(picture).astype(np.float32)
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(names))]
    for mask, colour in zip(detections.get("masks", ()), colours):
        inside = mask[0].numpy() > 0.5
        pixels[inside] = pixels[inside] / 2 + np.array(Image.new("RGB", (1, 1), colour))[0, 0] / 2
    picture = Image.fromarray(pixels.astype(np.uint8))
    canvas = ImageDraw.Draw(picture)
    width = max(2, max(picture.size) // 400)
    for box, name, colour in zip(detections["boxes"].tolist(), names, colours):
        canvas.rectangle(box, outline=colour, width=width)
        place = box[0] + width, box[1] + width
        canvas.rectangle(canvas.textbbox(place, name, font_size=7 * width), fill=colour)
        canvas.text(place, name, fill="white", font_size=7 * width)
    for points, colour in zip(detections.get("keypoints", torch.empty(0)).tolist(), colours):
        for x, y, _ in points:
            canvas.ellipse((x - width, y - width, x + width, y + width), fill=colour, outline="white")
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=pathlib.Path)
    parser.add_argument(
        "--model", default="fasterrcnn_resnet50_fpn", help="of torchvision or transformers (%(default)s)"
    )
    parser.add_argument("--weights", default="DEFAULT", help="DEFAULT, none, or a file with a state_dict (%(default)s)")
    parser.add_argument("--package", type=pathlib.Path, help="made if it does not exist (out/MODEL.pt2)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/detections.png"), help="(%(default)s)")
    parser.add_argument("--score", type=float, default=0.5, help="the least to draw (%(default)s)")
    parser.add_argument("--most", type=int, default=20, help="how many to draw, best first (%(default)s)")
    arguments = parser.parse_args()

    try:
        picture = Image.open(arguments.picture).convert("RGB")
    except OSError as error:
        sys.exit(f"cannot read {arguments.picture}: {error}")
    path = arguments.package or pathlib.Path("out") / f"{arguments.model.replace('/', '_')}.pt2"
    if not path.exists():
        make_package(arguments.model, arguments.weights, picture, path)
    package = torch._inductor.aoti_load_package(str(path))

    beside = preparation_of(path)
    image = prepare(picture, json.loads(beside.read_text()) if beside.exists() else {})
    detections, milliseconds = detect(package, image)
    detections = for_picture(detections, image, picture)
    drawn = (detections["scores"] >= arguments.score).nonzero().flatten()[: arguments.most]
    print(f"{len(detections['boxes'])} detections in {milliseconds:.0f} ms, {len(drawn)} of them are drawn")
    detections = {key: value[drawn] for key, value in detections.items()}
    labels = dict(enumerate(package.loader.get_metadata()["labels"].split(",")))
    found = zip(detections["labels"].tolist(), detections["scores"].tolist())
    names = [f"{labels.get(label, label)} {score:.2f}" for label, score in found]
    for name, box in zip(names, detections["boxes"].tolist()):
        print(f"  {name:24}", *(f"{side:7.1f}" for side in box))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    draw(picture, detections, names).save(arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
