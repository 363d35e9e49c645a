"""From an adapter to the model that answers: package, registry, deployment."""
