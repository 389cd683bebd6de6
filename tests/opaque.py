"""Classifiers of which nothing is known but what they say."""

from sklearn.base import BaseEstimator, ClassifierMixin, clone


class Decisions(ClassifierMixin, BaseEstimator):
    """Another classifier, of which nothing can be had but its labels."""

    def __init__(self, classifier):
        self.classifier = classifier

    def fit(self, X, y):
        self.classifier_ = clone(self.classifier).fit(X, y)
        self.classes_, self.n_features_in_ = self.classifier_.classes_, X.shape[1]
        return self

    def predict(self, X):
        return self.classifier_.predict(X)


class Opaque(Decisions):
    """Another classifier, whose kind no attack can see: trees without their leaves."""

    def predict_proba(self, X):
        return self.classifier_.predict_proba(X)
