"""Trains, evaluates and exports the base model that Lacuna ships (see train/README.md)."""
