"""Start the processes of a worker, here or on the nodes of a cluster, and speak with them in one way everywhere."""
