"""Who computes the local passes? One interface, interchangeable implementations."""
