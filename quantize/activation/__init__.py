"""Activation-compressed training: configuration, conversion of models, allocation of bits, reports."""
