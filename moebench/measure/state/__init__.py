"""Compare this process before and after a backend ran: torch's settings, and the state of the process itself."""
