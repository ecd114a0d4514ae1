"""What people and CI read: text, JSON and one self-contained HTML page."""
