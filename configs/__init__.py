"""Hydra files: one root a verb, groups beside them (arch/, data/, optim/, mesh/, tune/, eval/, serve/)."""
