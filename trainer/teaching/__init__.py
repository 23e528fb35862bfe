"""What several phases share: students, teachers, meta models, and everything made of them before a training."""
