"""The gateway: a proxy in front of a model server that logs what clients and models say."""
