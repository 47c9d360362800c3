"""Sweeps: jobs, the device pool, plans with time estimates, outcomes, and hyperparameter search with Optuna."""
