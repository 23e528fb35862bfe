"""What a run tells while it runs: metrics, trackers, warnings, lines on the terminal."""
