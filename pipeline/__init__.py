"""How a trained network becomes a measured release: capture, prune, measure, feed back, recover, export, bundle."""
