"""Looking into a model: what happens inside it at each time step.

`gradient_norms` shows how the loss's gradient lives or dies on its way back through time. Pictures need
matplotlib, which is imported only when one is drawn.
"""

from numlstm.inspect.gradients import GradientNorms, gradient_norms

__all__ = ["GradientNorms", "gradient_norms"]
