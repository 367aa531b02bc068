"""Check audio and captions before encoding, and report findings."""

from typing import TYPE_CHECKING

from sa3train.core.lazy import make_getattr

if TYPE_CHECKING:
    from sa3train.data.audit.audit import AuditIndex, AuditRules, audit_clip, run_audit
    from sa3train.data.audit.report import AuditSummary, write_audit_report

__all__ = ["AuditIndex", "AuditRules", "AuditSummary", "audit_clip", "run_audit", "write_audit_report"]
__getattr__ = make_getattr(
    __name__,
    {
        "AuditIndex": "audit",
        "AuditRules": "audit",
        "AuditSummary": "report",
        "audit_clip": "audit",
        "run_audit": "audit",
        "write_audit_report": "report",
    },
)
