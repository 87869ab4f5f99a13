"""The peers: expert layers of other libraries behind the interface of this package, to compare its layers with.

The registry imports a peer only when it is named. A peer converts its parameters to the other library's layout once,
when they are loaded, so that forward and backward run only the other library's code.
"""
