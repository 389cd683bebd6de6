"""The default networks have the sizes of the data, and a user's network is checked."""

import copy

import pytest
import torch
from torch import nn

from skjacobian.modules import ACTIVATIONS, CNN, MLP, make_module, may_draw, module_params


def kinds(module):
    return [type(part) for part in module]


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("hidden_units", [(), (5,), (6, 4, 3)])
def test_an_mlp_maps_samples_of_any_shape_to_logits(shape, hidden_units, generator):
    n_features = torch.Size(shape).numel()
    X = torch.randn(4, *shape, generator=generator)
    mlp = MLP(n_features, n_classes=3, hidden_units=hidden_units)
    assert mlp(X).shape == (4, 3)
    torch.testing.assert_close(mlp(X), mlp(X.flatten(1)))


def test_an_mlp_has_the_widths_that_were_asked_for():
    weights = [tuple(p.shape) for p in MLP(7, 3, hidden_units=(5, 4)).parameters()]
    assert weights == [(5, 7), (5,), (4, 5), (4,), (3, 4), (3,)]


def test_a_number_is_the_width_of_one_layer():
    assert str(MLP(7, 3, hidden_units=5)) == str(MLP(7, 3, hidden_units=(5,)))
    image = (1, 6, 6)
    assert str(CNN(image, 3, channels=4)) == str(CNN(image, 3, channels=[4]))
    for width in (8.0, "8", True, 0):
        with pytest.raises(ValueError, match=r"Got hidden_units=.*expected an integer of at"):
            MLP(7, 3, hidden_units=width)
    with pytest.raises(ValueError, match="Got channels=-1, but expected an integer of at least 1"):
        CNN(image, 3, channels=(4, -1))


def test_an_mlp_without_hidden_units_is_linear(generator):
    mlp = MLP(4, 3, hidden_units=())
    weight, bias = mlp.parameters()
    X = torch.randn(6, 4, generator=generator)
    torch.testing.assert_close(mlp(X), X @ weight.T + bias)


@pytest.mark.parametrize(
    ("input_shape", "image_shape"),
    [
        ((1, 8, 8), None),
        ((3, 7, 5), None),
        ((9, 6), None),
        ((1, 1, 4), None),
        ((1, 1, 1), None),
        ((64,), (8, 8)),
        ((48,), (3, 4, 4)),
        ((3, 16), (3, 4, 4)),
    ],
)
@pytest.mark.parametrize("channels", [(2,), (2, 3, 4, 5)])
def test_a_cnn_maps_images_of_any_size_to_logits(input_shape, image_shape, channels, generator):
    cnn = CNN(input_shape, 3, image_shape, channels=channels, kernel_size=3, hidden_units=(6,))
    X = torch.randn(4, *input_shape, generator=generator)
    assert cnn(X).shape == (4, 3)


def test_a_cnn_sees_the_same_image_flat_or_in_shape(generator):
    cnn = CNN((2, 6, 6), 3)
    X = torch.randn(4, 2, 6, 6, generator=generator)
    torch.testing.assert_close(cnn(X.flatten(1)), cnn(X))


def test_a_cnn_pools_only_until_one_pixel_is_left():
    pools = kinds(CNN((1, 4, 16), 2, channels=(2, 2, 2, 2))).count(nn.MaxPool2d)
    assert pools == 2


@pytest.mark.parametrize(
    ("input_shape", "image_shape", "match"),
    [
        ((64,), None, r"samples of shape \(64,\) and image_shape=None.*module__image_shape"),
        ((2, 3, 4, 5), None, r"samples of shape \(2, 3, 4, 5\)"),
        ((64,), (64,), r"image_shape=\(64,\), but the CNN expected images"),
        ((64,), (8, 9), r"Got image_shape=\(8, 9\), but expected .* the 64 features of a sample"),
        ((64,), (3, 8, 8), r"Got image_shape=\(3, 8, 8\), but expected"),
    ],
)
def test_a_cnn_says_which_image_shape_it_expected(input_shape, image_shape, match):
    with pytest.raises(ValueError, match=match):
        CNN(input_shape, 3, image_shape)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("make", [lambda **p: MLP(9, 2, **p), lambda **p: CNN((3, 3), 2, **p)])
def test_an_activation_is_chosen_by_name(make, name):
    assert ACTIVATIONS[name] in kinds(make(activation=name))


@pytest.mark.parametrize(
    ("name", "suggestion"), [("rellu", "'relu'"), ("Tanh", "'tanh'"), ("soft_plus", "'softplus'")]
)
def test_an_unknown_activation_is_rejected_with_the_closest_one(name, suggestion):
    match = f"Got activation='{name}', but expected one of 'relu'.*did you mean {suggestion}"
    with pytest.raises(ValueError, match=match):
        MLP(4, 2, activation=name)


@pytest.mark.parametrize("make", [lambda **p: MLP(9, 2, **p), lambda **p: CNN((3, 3), 2, **p)])
def test_dropout_follows_each_hidden_layer_and_only_where_asked_for(make):
    assert nn.Dropout not in kinds(make(hidden_units=(4, 4)))
    dropped = make(hidden_units=(4, 4), dropout=0.25)
    assert [part.p for part in dropped if isinstance(part, nn.Dropout)] == [0.25, 0.25]
    assert kinds(dropped)[-1] is nn.Linear


def with_noise(module):
    module.register_forward_hook(lambda module, inputs, output: output + torch.rand(()))
    return module


class UnknownLayer(nn.Module):
    def forward(self, X):
        return X


class OwnLinear(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("module", "drawing"),
    [
        (MLP(4, 2), False),
        (CNN((4, 4), 2), False),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()), False),
        (MLP(4, 2, dropout=0.5), True),
        (CNN((4, 4), 2, dropout=0.5), True),
        (nn.Sequential(nn.Linear(4, 2), nn.RReLU()), True),
        (UnknownLayer(), True),
        (OwnLinear(4, 2), True),
        (nn.Sequential(with_noise(nn.Linear(4, 2))), True),
    ],
)
def test_a_module_may_draw_unless_all_its_parts_are_known_not_to(module, drawing):
    assert may_draw(module) is drawing


SIZES = {"n_features": 6, "n_classes": 3, "input_shape": (2, 3)}


def takes_nothing():
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 3))


def takes_sizes(n_features, n_classes, width=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(n_features, n_classes))


def takes_anything(input_shape, **kwargs):
    return takes_nothing()


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (takes_nothing, set()),
        (takes_sizes, {"n_features", "n_classes"}),
        (takes_anything, {"input_shape"}),
        ("mlp", {"n_features", "n_classes"}),
        ("cnn", {"input_shape", "n_classes"}),
    ],
)
def test_a_module_is_given_the_sizes_that_its_signature_names(module, names):
    given = module_params(module, {}, input_shape=(2, 3), n_classes=3)
    assert given == {name: SIZES[name] for name in names}


@pytest.mark.parametrize(
    ("module", "given"),
    [(takes_sizes, {"width": 9}), (takes_sizes, {"n_classes": 7}), (takes_anything, {"any": 1})],
)
def test_what_the_user_gives_reaches_the_module_and_wins(module, given):
    assert given.items() <= module_params(module, given, input_shape=(6,), n_classes=3).items()


@pytest.mark.parametrize(
    ("module", "name", "match"),
    [
        (
            "mlp",
            "hiden_units",
            r"module__hiden_units=8, but expected .*did you mean 'hidden_units'",
        ),
        ("cnn", "chanels", r"module__chanels=8.*image_shape, channels.*did you mean 'channels'"),
        (takes_sizes, "widht", r"module__widht=8.*did you mean 'width'"),
        (takes_nothing, "width", r"Got module__width=8, but expected a parameter of the module"),
    ],
)
def test_a_mistyped_parameter_of_the_module_is_rejected_with_the_closest(module, name, match):
    with pytest.raises(ValueError, match=match):
        module_params(module, {name: 8}, input_shape=(6,), n_classes=3)


def test_an_instance_is_rejected_where_a_class_is_expected():
    with pytest.raises(TypeError, match=r"module=<instance of Linear>, but expected a class"):
        module_params(nn.Linear(6, 3), {}, input_shape=(6,), n_classes=3)


def made(module, *, input_shape=(6,), n_classes=3, dtype=torch.float32):
    sizes = {"input_shape": input_shape, "n_classes": n_classes}
    params = module_params(module, {}, **sizes)
    return make_module(module, params, dtype=dtype, **sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("module", "input_shape"), [("mlp", (6,)), ("cnn", (1, 4, 4)), (takes_sizes, (2, 3))]
)
def test_a_module_is_made_in_training_mode_and_in_the_dtype_asked_for(module, input_shape, dtype):
    module = made(module, input_shape=input_shape, dtype=dtype)
    assert all(part.training for part in module.modules())
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert module(torch.zeros(5, *input_shape, dtype=dtype)).shape == (5, 3)


class Lazy(nn.Module):
    def __init__(self, n_classes):
        super().__init__()
        self.layers = nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.LazyLinear(n_classes))

    def forward(self, X):
        return self.layers(X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lazy_layers_are_sized_from_the_data(dtype):
    shapes = {name: tuple(p.shape) for name, p in made(Lazy, dtype=dtype).named_parameters()}
    assert shapes["layers.0.weight"] == (5, 6)
    assert shapes["layers.2.weight"] == (3, 5)


def normalized():
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


def test_the_trial_leaves_no_trace_in_batch_statistics():
    norm = made(normalized)[1]
    assert norm.num_batches_tracked == 0
    torch.testing.assert_close(norm.running_mean, torch.zeros(4))
    torch.testing.assert_close(norm.running_var, torch.ones(4))


class Pair(nn.Linear):
    def forward(self, X):
        return super().forward(X), X


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: nn.Linear(6, 2), r"shape \(2, 2\), but expected logits of shape \(2, 3\)"),
        (lambda: nn.Unflatten(1, (2, 3)), r"shape \(2, 2, 3\), but expected logits"),
        (lambda: Pair(6, 3), r"for 2 samples has shape tuple, but expected logits"),
        (lambda: "mlp", r"Got module=.*expected something that makes an nn\.Module, not str"),
        (lambda: None, r"expected something that makes an nn\.Module, not NoneType"),
    ],
)
def test_what_is_not_a_module_that_returns_logits_is_rejected(make, match):
    with pytest.raises(ValueError, match=match):
        made(make)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_a_module_that_returns_probabilities_is_warned_of(n_classes):
    def make():
        return nn.Sequential(nn.Linear(6, n_classes), nn.Softmax(1))

    with pytest.warns(UserWarning, match="sum to 1, as probabilities do.*leave out the softmax"):
        made(make, n_classes=n_classes)


def test_what_is_handed_over_is_copied():
    backbone = nn.Linear(4, 5)
    take = lambda backbone: nn.Sequential(backbone, nn.Linear(5, 3))  # noqa: E731
    sizes = {"input_shape": (4,), "n_classes": 3}
    made = make_module(take, {"backbone": backbone}, dtype=torch.float32, **sizes)
    assert made[0] is not backbone
    assert torch.equal(made[0].weight, backbone.weight)


@pytest.mark.parametrize(
    "wrap", [lambda net: net, lambda net: nn.Sequential(net, nn.Linear(3, 3))], ids=["it", "a part"]
)
def test_weights_to_train_are_handed_over_once(wrap):
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    sizes = {"dtype": torch.float32, "input_shape": (4,), "n_classes": 3}
    made = make_module(lambda: wrap(net), {}, **sizes)
    with pytest.raises(ValueError, match="returned weights that it had returned before"):
        make_module(lambda: wrap(net), {}, **sizes)
    copied = make_module(lambda: copy.deepcopy(wrap(net)), {}, **sizes)
    again = make_module(lambda: copy.deepcopy(wrap(net)), {}, **sizes)
    assert len({id(p) for module in (made, copied, again) for p in module.parameters()}) == 3 * len(
        list(made.parameters())
    )


def test_a_backbone_held_fixed_may_be_shared():
    backbone = nn.Linear(4, 5).requires_grad_(False)
    sizes = {"dtype": torch.float32, "input_shape": (4,), "n_classes": 3}
    for _ in range(2):
        made = make_module(lambda: nn.Sequential(backbone, nn.Linear(5, 3)), {}, **sizes)
        assert made[0] is backbone


def test_complex_weights_are_rejected():
    make = lambda: nn.Linear(4, 3, dtype=torch.cfloat)  # noqa: E731
    with pytest.raises(ValueError, match="expected one with real weights"):
        make_module(make, {}, dtype=torch.float32, input_shape=(4,), n_classes=3)


@pytest.mark.parametrize("make", [nn.Identity, lambda: nn.Linear(3, 3).requires_grad_(False)])
def test_a_module_with_nothing_to_train_is_rejected(make):
    with pytest.raises(ValueError, match="expected one with a parameter to train"):
        make_module(make, {}, dtype=torch.float32, input_shape=(3,), n_classes=3)


def test_a_module_that_wants_more_than_the_data_say_is_an_error_that_tells_how():
    def wants_width(n_features, n_classes, width):
        return MLP(n_features, n_classes, hidden_units=width)

    sizes = {"input_shape": (4,), "n_classes": 3}
    params = module_params(wants_width, {}, **sizes)
    expected = r"expected all of its parameters, each said as module__<parameter>=.*'width'"
    with pytest.raises(TypeError, match=expected):
        make_module(wants_width, params, dtype=torch.float32, **sizes)
    params = module_params(wants_width, {"width": 5}, **sizes)
    assert make_module(wants_width, params, dtype=torch.float32, **sizes)[1].out_features == 5
