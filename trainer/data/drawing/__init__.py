"""What draws the procedural images, with numpy alone: imported by the trainer, and by light processes that draw."""
