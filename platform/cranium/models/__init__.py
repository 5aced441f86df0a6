"""Networks in plain torch: backbones, the weights that go into them, pooling over slices, probes."""
