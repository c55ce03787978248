{{- define "fido.labels" -}}
app.kubernetes.io/name: fido
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
{{- define "fido.probe" -}}
exec:
  command: [python3, /etc/fido/probe.py]
timeoutSeconds: 10
periodSeconds: 10
{{- end }}
{{- define "fido.security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}
