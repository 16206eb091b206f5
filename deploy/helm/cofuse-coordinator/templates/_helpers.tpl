{{- define "cofuse.labels" -}}
app.kubernetes.io/name: cofuse-coordinator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "cofuse.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "cofuse.closed" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}
