"""What imports Streamlit, and nothing else."""
