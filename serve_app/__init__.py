"""whisper-serve: Whisper speech-to-text as a Ray Serve application."""

__version__ = "0.1.0"
