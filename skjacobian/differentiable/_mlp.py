"""The view of scikit-learn's multi-layer perceptron, as a torch network."""

import torch
from sklearn.neural_network import MLPClassifier
from torch import Tensor, nn

from skjacobian.differentiable._linear_classifiers import check_is_not_multilabel
from skjacobian.differentiable._networks import Network
from skjacobian.differentiable._registry import ClassifierView, binary_logits, view_of
from skjacobian.layers import linear

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "identity": nn.Identity,
    "logistic": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
}


class Perceptrons(Network):
    """Layers of perceptrons, with a copy of the weights of an `MLPClassifier`.

    They are in the dtype that the classifier was fitted in, and compute in it.
    """

    def __init__(self, classifier: MLPClassifier) -> None:
        layers: list[nn.Module] = []
        for W, b in zip(classifier.coefs_, classifier.intercepts_, strict=True):
            layer = linear(torch.tensor(W.T), torch.tensor(b)).requires_grad_(False)
            layers += [layer, ACTIVATIONS[classifier.activation]()]
        super().__init__(nn.Sequential(*layers[:-1]))

    def forward(self, X: Tensor) -> Tensor:
        """Return the logits of `X`; of two classes the one output is the decision."""
        outputs = super().forward(X)
        return binary_logits(outputs.squeeze(1)) if outputs.shape[1] == 1 else outputs


@view_of(
    MLPClassifier,
    settings=(
        *("hidden_layer_sizes", "activation", "solver", "alpha", "batch_size", "learning_rate"),
        *("learning_rate_init", "power_t", "max_iter", "shuffle", "random_state", "tol"),
        *("verbose", "warm_start", "momentum", "nesterovs_momentum", "early_stopping"),
        *("validation_fraction", "beta_1", "beta_2", "epsilon", "n_iter_no_change", "max_fun"),
    ),
)
def _(classifier: MLPClassifier) -> ClassifierView:
    check_is_not_multilabel(classifier)
    return Perceptrons(classifier)
