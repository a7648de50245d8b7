"""What a run leaves behind: metrics, rollouts, a page that shows both, and a live view in the terminal."""
