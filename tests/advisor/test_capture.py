"""Which convolutions of a model the advisor sees, and what it may put in their places."""

import pytest
import torch
import torch.nn.functional as F
from inductor_vision import deform_conv2d, patch_conv2d
from inductor_vision.advisor import choices, replace
from inductor_vision.advisor.capture import capture
from inductor_vision.advisor.target import Program
from torch import nn


class Chain(nn.Module):
    """Modules in turn, some of them several times."""

    def __init__(self, order, **modules):
        super().__init__()
        self.order = order.split()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        for name in self.order:
            x = getattr(self, name)(x)
        return x


def seen(model, *inputs):
    return capture(Program(model.eval(), inputs), 0.0, lambda text: None)


def only(model, *inputs):
    [layer] = seen(model, *inputs).layers
    return layer


IMAGE = torch.randn(2, 8, 9, 11, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("make", "description"),
    [
        (lambda: nn.Conv2d(8, 4, 3, stride=2, dilation=2, padding=2), "plain 3x3, 8 -> 4, stride 2, dilation 2"),
        (lambda: nn.Conv2d(8, 4, 1), "pointwise 1x1, 8 -> 4"),
        (lambda: nn.Conv2d(8, 4, 3, groups=2), "grouped 3x3, 8 -> 4, 2 groups"),
        (lambda: nn.Conv2d(8, 16, (3, 5), groups=8, padding="same"), "depthwise 3x5, 8 -> 16"),
        (lambda: nn.ConvTranspose2d(8, 4, 3, stride=2, groups=2), "transposed 3x3, 8 -> 4, stride 2, 2 groups"),
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_kinds(make, description, mode):
    model = Chain("layer", layer=make())
    model.forward = mode()(model.forward)
    layer = only(model, IMAGE)
    assert layer.describe() == description
    assert (layer.names, layer.calls, str(layer.input)) == (("layer",), 1, "2x8x9x11")
    assert layer.swappable == (("layer",) if isinstance(model.layer, nn.Conv2d) else ())


@pytest.mark.parametrize("dimensions", [1, 3])
def test_other_dimensions_are_listed_and_nothing_is_tried(dimensions):
    layer = only(getattr(nn, f"Conv{dimensions}d")(2, 3, 3), torch.randn(1, 2, *[5] * dimensions))
    assert layer.describe() == f"{dimensions}-D {'x'.join('3' * dimensions)}, 2 -> 3"
    assert choices.choices_of(layer, 4, compiling=True) == []
    assert choices.as_it_is(layer).prepare().output.shape == (1, 3, *[3] * dimensions)


def test_memory_format_and_dtype_are_those_of_the_call():
    layer = only(nn.Conv2d(8, 4, 3).bfloat16(), IMAGE.bfloat16().contiguous(memory_format=torch.channels_last))
    assert str(layer.input) == "2x8x9x11 bfloat16 channels_last"
    assert {choice.name for choice in choices.choices_of(layer, 1, compiling=True)} == {
        "contiguous",
        "float32",
        "image by image",
    }


def test_calls_of_one_layer_are_counted_and_layers_that_are_alike_are_one():
    model = Chain(
        "first shared shared other shared", first=nn.Conv2d(8, 8, 1), shared=nn.Conv2d(8, 8, 3, padding=1),
        other=nn.Conv2d(8, 8, 3, padding=1),
    )  # fmt: skip
    layers = {layer.names: layer for layer in seen(model, IMAGE).layers}
    alike = layers["shared", "other"]
    assert (alike.calls, alike.swappable) == (4, ("shared", "other"))
    assert layers["first",].calls == 1


def test_one_module_under_two_names_is_replaced_under_both():
    conv = nn.Conv2d(8, 8, 1)
    assert only(Chain("a b", a=conv, b=conv), IMAGE).swappable == ("a", "b")


def test_functions_belong_to_the_module_that_calls_them_and_cannot_be_replaced():
    class Head(nn.Module):
        def forward(self, x):
            return F.conv2d(x, torch.ones(4, 8, 3, 3))

    class Own(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) + 1

    layers = seen(Chain("own head", own=Own(8, 8, 1), head=Head()), IMAGE).layers
    assert {layer.names: layer.swappable for layer in layers} == {("own",): (), ("head",): ()}


def test_shares_are_parts_of_the_time():
    found = seen(Chain("a b", a=nn.Conv2d(8, 64, 3), b=nn.Conv2d(64, 8, 3)), IMAGE)
    shares = [found.share(layer) for layer in found.layers]
    assert 0 < sum(shares) <= 1 + 1e-9 and shares == sorted(shares, reverse=True)


def test_depthwise_separable_convolutions_are_noticed():
    depthwise, pointwise = nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.Conv2d(8, 4, 1)
    excitation = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1))

    class Block(Chain):
        def forward(self, x):
            x = depthwise(x)
            return pointwise(x * excitation(x))

    assert seen(Chain("d p", d=depthwise, p=pointwise), IMAGE).has_separable
    assert seen(Block(""), IMAGE).has_separable
    assert not seen(Chain("p d", p=nn.Conv2d(8, 8, 1), d=depthwise), IMAGE).has_separable


def test_convolutions_for_winograd_are_noticed():
    assert seen(Chain("c", c=nn.Conv2d(8, 8, 3)), IMAGE).has_winograd
    others = {"stride": 2}, {"dilation": 2}, {"kernel_size": 5}
    assert not any(seen(Chain("c", c=nn.Conv2d(8, 8, **{"kernel_size": 3, **o})), IMAGE).has_winograd for o in others)


class Deformable(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.offset = layer, nn.Conv2d(8, 18, 3, padding=1)

    def forward(self, x):
        return self.layer(x, self.offset(x))


def test_deformable_convolution_of_torchvision_as_this_packages(torchvision):
    model = Deformable(torchvision.ops.DeformConv2d(8, 4, 3, padding=1))
    found = seen(model, IMAGE)
    [layer] = [layer for layer in found.layers if layer.kind == "deformable"]
    assert found.calls_torchvision
    assert (layer.describe(), layer.swappable) == ("deformable 3x3, 8 -> 4", ("layer",))
    by_name = {choice.name: choice for choice in choices.choices_of(layer, 1, compiling=True)}
    assert by_name.keys() == {"deform_conv2d", "image by image"}
    right = choices.as_it_is(layer).prepare().output
    for choice in by_name.values():
        torch.testing.assert_close(choice.prepare().output, right)
    with torch.no_grad():
        expected = model(IMAGE)
        model.layer = replace.deform_conv2d(model.layer)
        torch.testing.assert_close(model(IMAGE), expected)
    assert "deform_conv2d" not in {choice.name for choice in choices.choices_of(layer, 1, compiling=False)}


def test_operators_of_this_package():
    class Ours(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 8, 3, 3))

        def forward(self, x):
            y = deform_conv2d(x, torch.zeros(2, 18, 7, 9), self.weight)
            return y + patch_conv2d(x, self.weight)

    layers = {layer.kind: layer for layer in seen(Ours(), IMAGE).layers}
    assert layers["deformable"].describe() == "deformable 3x3, 8 -> 4"
    assert layers["patches"].describe() == "patches 3x3, 8 -> 4"
    assert [c.name for c in choices.choices_of(layers["deformable"], 1, compiling=True)] == ["compiled"]


def test_patches_are_a_large_batch_of_small_images():
    conv = nn.Conv2d(8, 16, 3, padding=1)
    names = lambda *shape: {c.name for c in choices.choices_of(only(conv, torch.randn(shape)), 1, compiling=True)}  # noqa: E731
    assert "patch_conv2d" in names(256, 8, 16, 4)
    assert "patch_conv2d" not in names(255, 8, 4, 4) | names(256, 8, 17, 4)


def test_every_choice_computes_what_the_layer_does():
    layer = only(Chain("c c", c=nn.Conv2d(8, 8, 3, padding=1, groups=4)), torch.randn(5, 8, 7, 6))
    right = choices.as_it_is(layer).prepare().output
    found = choices.choices_of(layer, 4, compiling=False)
    assert [choice.name for choice in found] == [
        "channels_last", "bfloat16", "dense", "image by image", "1 thread", "2 threads",
    ]  # fmt: skip
    assert [choice.threads for choice in found][-2:] == [1, 2]
    for choice in found:
        tolerance = {"rtol": 0.05, "atol": 0.05} if choice.changes_precision else {}
        torch.testing.assert_close(choice.prepare().output.float(), right, **tolerance)


@pytest.mark.parametrize("shape", [(5, 1, 7, 6), (5, 1, 1, 6)])
def test_an_input_whose_elements_share_memory(shape):
    """As those of a grey image as three channels, or of windows that overlap."""
    image = torch.randn(shape).expand(-1, 3, 7, -1)
    layer = only(nn.Conv2d(3, 8, 3, padding=1), image)
    assert layer.input.stride == image.stride() and 0 in image.stride()
    assert layer.input.random().stride() == image.stride()
    right = choices.as_it_is(layer).prepare().output
    for choice in choices.choices_of(layer, 2, compiling=False):
        if not choice.changes_precision:
            torch.testing.assert_close(choice.prepare().output, right)


def test_compiled_patches_compute_what_the_layer_does():
    layer = only(nn.Conv2d(4, 8, 3, padding=1, groups=2), torch.randn(256, 4, 4, 5))
    [choice] = [choice for choice in choices.choices_of(layer, 1, compiling=True) if choice.name == "patch_conv2d"]
    torch.testing.assert_close(choice.prepare().output, choices.as_it_is(layer).prepare().output)


@pytest.mark.parametrize("groups", [2, 8])
@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": "same", "padding_mode": "circular"}, {"bias": False}])
def test_dense_with_zero_blocks(groups, options):
    layer = nn.Conv2d(8, 16, 3, groups=groups, **options).double()
    other = replace.dense(layer)
    assert (other.groups, other.weight.shape[1], other.weight.count_nonzero()) == (1, 8, layer.weight.numel())
    torch.testing.assert_close(other(IMAGE.double()), layer(IMAGE.double()))


@pytest.mark.parametrize("options", [{"padding": 1}, {"padding": "same", "padding_mode": "reflect"}, {"groups": 4}])
def test_replacement_by_patches(options):
    layer = nn.Conv2d(8, 16, 3, **options)
    torch.testing.assert_close(replace.PatchConv2d(layer)(IMAGE), layer(IMAGE))


def test_replacements_in_another_form():
    layer = nn.Conv2d(8, 16, 3)
    expected = layer(IMAGE)
    torch.testing.assert_close(replace.ImageByImage(layer)(IMAGE), expected)
    out = replace.Computing(layer, memory_format=torch.channels_last)(IMAGE)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected)
    out = replace.Computing(layer, dtype=torch.bfloat16)(IMAGE)
    assert out.dtype == torch.float32 and 0 < (out - expected).abs().max() < 0.05
