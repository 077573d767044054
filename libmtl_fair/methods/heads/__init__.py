"""Auxiliary fairness heads (GLF, GLD), LambdaMix, and heads per group."""
