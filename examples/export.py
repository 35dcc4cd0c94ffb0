"""Export a small model with a deformable convolution to a package that runs without Python and without this library.

    python examples/export.py [--out out/model.pt2] [--target x86-64-v3] [--check]

One package serves every batch and image size. ``--target`` says for which processors, by default such as this one.
``--check`` runs it at two sizes and compares with the model.
"""

from __future__ import annotations

import argparse
import pathlib
import warnings

import torch
from inductor_vision import DeformConv2d, package_target
from torch import Tensor, nn
from torch.export import Dim

OPTIONS = {
    "aot_inductor.check_lowerbound": False,  # the check of inputs that run.cpp asks for would otherwise refuse batch 1
}

warnings.filterwarnings("ignore", message=".*LeafSpec")  # torch.export speaks of its own internals


class Model(nn.Module):
    """A deformable convolution (version 2) whose offsets and mask come from a convolution of the input."""

    def __init__(self, channels: int = 3, out_channels: int = 16) -> None:
        super().__init__()
        self.where = nn.Conv2d(channels, 3 * 9, 3, padding=1)  # (y, x) and mask for each of the 3x3 taps
        self.convolve = DeformConv2d(channels, out_channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, image: Tensor) -> Tensor:
        offset, mask = self.where(image).split([18, 9], dim=1)
        return torch.relu(self.norm(self.convolve(image, offset, mask.sigmoid())))


def export(model: nn.Module, path: pathlib.Path, channels: int = 3, target: str | None = None) -> None:
    """Compile the model into a package at ``path`` for a kind of processors; batch, height and width stay variable."""
    # Sizes differ from one another and from 0 and 1, which torch.export would take for constants.
    example = torch.randn(2, channels, 48, 64)
    dynamic_shapes = ({0: Dim("batch", min=1, max=1024), 2: Dim("height", min=2), 3: Dim("width", min=2)},)
    with torch.no_grad():
        exported = torch.export.export(model.eval(), (example,), dynamic_shapes=dynamic_shapes)
        path.parent.mkdir(parents=True, exist_ok=True)
        with package_target(target):
            torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=OPTIONS)


def check(model: nn.Module, path: pathlib.Path) -> None:
    loaded = torch._inductor.aoti_load_package(str(path))
    for batch, height, width in ((1, 33, 47), (3, 64, 40)):
        image = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            error = (loaded(image) - model(image)).abs().max().item()
        print(f"batch {batch}, {height}x{width}: largest difference to the model {error:.1e}")
        if not error < 1e-4:
            raise SystemExit("the package and the model disagree")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/model.pt2"), help="(%(default)s)")
    parser.add_argument("--target", help="see inductor_vision.package_target (default: processors like this one)")
    parser.add_argument("--check", action="store_true", help="run the package and compare")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = Model()
    print("exporting and compiling ...", flush=True)
    export(model, arguments.out, target=arguments.target)
    print(f"wrote {arguments.out} ({arguments.out.stat().st_size / 1e6:.1f} MB)")
    if arguments.check:
        check(model, arguments.out)
    print(f"""
Run it in Python, where torch is enough:
    import torch
    model = torch._inductor.aoti_load_package("{arguments.out}")
    print(model(torch.randn(4, 3, 224, 320)).shape)

Run it in C++:
    examples/cpp/build.sh out/run
    out/run {arguments.out} --shape 4x3x224x320""")


if __name__ == "__main__":
    main()
