"""Give the expert layers of other libraries (peers) this package's interface, to compare its layers with the peers.

The registry imports a peer only when a caller names it. A peer converts the parameters to the other library's layout
once, when a state dict is loaded. So forward and backward run only the other library's code.
"""
