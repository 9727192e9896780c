"""Several processes, one a host, as one run: how they find each other, talk and end together."""
