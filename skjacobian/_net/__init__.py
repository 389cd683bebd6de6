"""The skorch net inside the classifiers. The only folder that imports skorch."""
