from .audit import AuditIndex as AuditIndex
from .audit import AuditRules as AuditRules
from .audit import audit_clip as audit_clip
from .audit import run_audit as run_audit
from .report import AuditSummary as AuditSummary
from .report import write_audit_report as write_audit_report
