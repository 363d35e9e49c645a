"""The verdict for people: report and charts."""
