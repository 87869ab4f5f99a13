"""Expert layers of other libraries behind our own contract, to be measured beside ours. Nothing imports this package.

The registry knows their names and imports a peer when it is named. Each hands the other library its parameters in that
library's own layout, once, when they are loaded, so that forward and backward run its code alone.
"""
