"""Looking into a model: what happens inside it at each time step.

`trace` gives every gate, state and gradient by step as named arrays; `gradient_norms` shows how the loss's
gradient lives or dies on its way back through time; `page` writes a model's gates over a text or a series as
one HTML file; `plots` draws pictures. Those need matplotlib, which is imported only when one is drawn.
"""

from numlstm.inspect import plots
from numlstm.inspect.gradients import GradientNorms, gradient_norms
from numlstm.inspect.pages import page
from numlstm.inspect.tracing import LayerTrace, Trace, trace

__all__ = ["GradientNorms", "LayerTrace", "Trace", "gradient_norms", "page", "plots", "trace"]
