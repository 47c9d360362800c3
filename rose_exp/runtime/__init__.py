"""What every layer above the engine needs: errors, fingerprints, signals, ranks and files that come in wheels."""
