"""FiD and FiDO as torch modules."""
