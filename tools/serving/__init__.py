"""The tiny run's merged model, behind real servers and loaders on this CPU: `make test-serving`."""
