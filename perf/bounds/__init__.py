"""Operations and bytes of a reader by arithmetic, the measured rates of this machine, and measured stages compared with both."""
